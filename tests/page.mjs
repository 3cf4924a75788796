// Runs page.js in a document with only the browser functions it needs. Prints one JSON object for tests/test_page.py.
import fs from "node:fs";
import vm from "node:vm";

class Element {
  constructor(id = "") {
    Object.assign(this, { id, children: [], listeners: {}, dataset: {}, files: [], hidden: false, value: "", className: "" });
    Object.assign(this, { text: "", attributes: {}, part: null, classList: { toggle() {} } });
  }
  get textContent() { return this.text + this.children.map((one) => one.textContent ?? one).join(""); }
  set textContent(text) { this.text = text; this.children = []; }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  send(kind) { if (!this.disabled) this.listeners[kind]?.({ preventDefault() {} }); }
  append(...more) { this.children.push(...more); for (const one of more) if (one instanceof Element) one.parent = this; }
  replaceChildren(...more) { this.text = ""; this.children = []; this.append(...more); }
  remove() { this.parent.children = this.parent.children.filter((one) => one !== this); }
  after(...more) { this.part.added = more; }
  querySelector(selector) {
    if (selector === ".row") return Object.assign(new Element(), { part: this });
    return this.added.find((one) => one.className === selector.slice(1));
  }
  closest() { return this.part; }
  setAttribute(name, value) { this.attributes[name] = value; }
  removeAttribute(name) { delete this.attributes[name]; }
  scrollIntoView() {}
  focus() {}
}

const ids = {};
const $ = (id) => (ids[id] ??= new Element(id));
const parts = ["describing", "attend", "ask", "match", "search"].map($);
Object.assign($("describe"), { part: $("describing"), dataset: { needs: "write picture" } });
$("matches").tBodies = [new Element()];
const document = {
  getElementById: $,
  createElement: () => new Element(),
  addEventListener() {},
  querySelectorAll(selector) {
    if (selector === ".part") return parts;
    if (selector === ".problem") return parts.map((part) => part.querySelector(".problem"));
    return selector.startsWith("[data-needs]") ? [$("describe")] : [];
  },
};

const requests = [];
function fetch(path, options = {}) {
  if (path === "health") {
    const health = { model: "m", can: { write: true, match: true, search: true } };
    return Promise.resolve({ ok: true, status: 200, json: async () => health });
  }
  return new Promise((resolve, reject) => {
    const request = { path, options, aborted: false };
    request.answer = (value, status = 200) => resolve({ ok: status === 200, status, json: async () => value });
    options.signal.addEventListener("abort", () => { request.aborted = true; });
    requests.push(request); // answered even after an abort, which is the worst case
    request.fail = reject;
  });
}

const settle = async () => { for (let n = 0; n < 20; n++) await new Promise((done) => setImmediate(done)); };
const URLs = { createObjectURL: (file) => `blob:${file.name}`, revokeObjectURL() {} };
const storage = { getItem: () => null, setItem() {} };
const world = { document, fetch, URL: URLs, sessionStorage: storage, FormData, AbortController, setTimeout, JSON, Map, Promise, Error };
vm.runInNewContext(fs.readFileSync(process.argv[2], "utf8"), { ...world, console });
await settle();

const seen = {};
const choose = (name) => { $("file").files = [{ name }]; $("file").send("change"); };
const error = () => $("describing").querySelector(".problem");
const waiting = () => !$("describing").querySelector(".wait").hidden;
seen.disabled_without_picture = $("describe").disabled;
FormData.prototype.append = () => {};
choose("a.png");
$("describe").send("click");
$("describe").disabled = false; // as if a click arrived anyway
$("describe").send("click");
seen.requests_of_two_clicks = requests.length;
seen.waits = waiting();
choose("b.png");
seen.aborted_by_another_picture = requests[0].aborted;
seen.waits_after_another_picture = waiting();
requests[0].answer({ caption: "a caption of a" });
await settle();
seen.caption_under_b = $("caption").textContent;
$("describe").send("click");
requests[1].answer({ error: { message: "it went wrong" } }, 400);
await settle();
seen.error = [error().hidden, error().textContent];
$("describe").send("click");
seen.error_hidden_by_next_attempt = error().hidden;
requests[2].answer({ caption: "a caption of b" });
await settle();
seen.caption = $("caption").textContent;
$("describe").send("click");
$("describing").querySelector(".wait").children.at(-1).send("click"); // Stop
seen.stopped = [requests[3].aborted, waiting(), error().hidden];
requests[3].answer({ caption: "too late" });
await settle();
seen.caption_after_stop = $("caption").textContent;
console.log(JSON.stringify(seen));

"use strict";
// The page of `openblip2 serve`. Texts of models and users are inserted as text, never as HTML.
const $ = (id) => document.getElementById(id);
const state = { file: null, url: "", map: "", turns: [], can: {}, token: sessionStorage.getItem("token") || "" };
const running = new Map(); // part of the page -> AbortController of its request

// ---- requests

async function call(path, signal, options = {}, retried = false) {
  const headers = { ...(options.headers || {}) };
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  const answer = await fetch(path, { ...options, headers, signal });
  if (answer.status === 401 && !retried) {
    await askToken();
    return call(path, signal, options, true);
  }
  if (!answer.ok) {
    let message = `The server answered with status ${answer.status}.`;
    try { message = (await answer.json()).error.message; } catch { /* not JSON: the status is all there is */ }
    throw new Error(message);
  }
  return answer;
}

function askToken() {
  return new Promise((done) => {
    $("door").addEventListener("close", () => {
      state.token = $("token").value;
      sessionStorage.setItem("token", state.token);
      done();
    }, { once: true });
    $("door").showModal();
  });
}

// Runs the one request of a part: with a spinner and a Stop button, and with an error beside its buttons. While it
// runs, further clicks do nothing. `job` gets the signal of the request and must check it after each `await`.
async function work(part, job) {
  if (running.has(part)) return;
  const controller = new AbortController();
  running.set(part, controller);
  part.querySelector(".problem").hidden = true;
  part.querySelector(".wait").hidden = false;
  part.setAttribute("aria-busy", "true");
  enable();
  try {
    await job(controller.signal);
  } catch (error) {
    if (!controller.signal.aborted) problem(part, error.message);
  } finally {
    if (running.get(part) === controller) finish(part);
  }
}

function problem(part, message) {
  part.querySelector(".problem").textContent = message;
  part.querySelector(".problem").hidden = false;
}

function finish(part) {
  running.delete(part);
  part.querySelector(".wait").hidden = true;
  part.removeAttribute("aria-busy");
  enable();
}

// The part can be used again at once, before the request has ended.
function stop(part) {
  running.get(part)?.abort();
  if (running.has(part)) finish(part);
}

function enable() {
  for (const button of document.querySelectorAll("[data-needs], .part button:not(.stop)")) {
    const needs = (button.dataset.needs || "").split(" ").filter(Boolean);
    const can = needs.every((need) => need === "picture" ? state.file : state.can[need]);
    button.disabled = !can || (running.has(button.closest(".part")) && button.id !== "again");
  }
}

for (const part of document.querySelectorAll(".part")) {
  const wait = document.createElement("p"), error = document.createElement("p"), button = document.createElement("button");
  wait.className = "wait";
  wait.hidden = error.hidden = true;
  const spinner = document.createElement("span");
  spinner.className = "spinner";
  button.className = "stop";
  button.type = "button";
  button.textContent = "Stop";
  button.addEventListener("click", () => stop(part));
  wait.append(spinner, " Working ... ", button);
  error.className = "problem";
  error.setAttribute("role", "alert");
  part.querySelector(".row").after(wait, error);
}

function form(fields) {
  const data = new FormData();
  for (const [name, value] of fields) data.append(name, value);
  return { method: "POST", body: data };
}

// ---- the picture

// Shows another picture. Requests for the old one are stopped, and its results are removed.
function take(file) {
  if (!file) return;
  for (const part of [...running.keys()]) stop(part);
  if (state.url) URL.revokeObjectURL(state.url);
  state.file = file;
  state.url = URL.createObjectURL(file);
  state.turns = [];
  $("turns").replaceChildren();
  $("caption").textContent = "";
  $("matches").hidden = true;
  for (const error of document.querySelectorAll(".problem")) error.hidden = true;
  showPicture();
  enable();
}

function show(url, alt) {
  if (state.map) URL.revokeObjectURL(state.map);
  state.map = url === state.url ? "" : url;
  $("shown").src = url;
  $("shown").alt = alt;
  $("shown").hidden = false;
  $("hint").hidden = true;
  $("plain").hidden = $("legend").hidden = !state.map;
}

function showPicture() {
  show(state.url, `The chosen picture, ${state.file.name}`);
}

$("file").addEventListener("change", () => { take($("file").files[0]); $("file").value = ""; });
for (const kind of ["dragover", "dragleave", "drop"])
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
document.addEventListener("paste", (event) => take([...event.clipboardData.files].find((f) => f.type.startsWith("image/"))));
$("plain").addEventListener("click", () => { stop($("attend")); showPicture(); });

$("describe").addEventListener("click", () => work($("describing"), async (signal) => {
  $("caption").textContent = "";
  const { caption } = await (await call("caption", signal, form([["image", state.file]]))).json();
  signal.throwIfAborted();
  $("caption").textContent = caption || "(no text)";
}));

$("attend").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!state.file) return;
  work($("attend"), async (signal) => {
    const text = $("about-text").value.trim(), by = $("by").value;
    const fields = [["image", state.file], ["by", by]];
    if (text) fields.push(["text", text]);
    const map = await (await call("attend", signal, form(fields))).blob();
    signal.throwIfAborted();
    $("legend-about").textContent = text ? `“${text}”${state.can.match ? ` (${by.toUpperCase()})` : ""}` : "all queries together";
    show(URL.createObjectURL(map), `${state.file.name}, with a map of where the model looks`);
    $("picture").scrollIntoView({ block: "nearest" });
  });
});

// ---- the dialogue

function turn(kind, speaker, text) {
  const item = document.createElement("li"), who = document.createElement("strong"), said = document.createElement("span");
  item.className = kind;
  who.textContent = speaker;
  said.textContent = text;
  item.append(who, said);
  $("turns").append(item);
  item.scrollIntoView({ block: "nearest" });
  return { item, said };
}

$("again").addEventListener("click", () => {
  stop($("ask"));
  state.turns = [];
  $("turns").replaceChildren();
  $("question").focus();
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || !state.file) return;
  work($("ask"), async (signal) => {
    const turns = state.turns, messages = [];
    for (const [asked, said] of turns)
      messages.push({ role: "user", content: asked }, { role: "assistant", content: said });
    const asked = turn("q", "You", question), answer = turn("a", "Model", "");
    try {
      const url = await dataUrl(state.file);
      signal.throwIfAborted();
      messages.push({ role: "user", content: [{ type: "text", text: question }, { type: "image_url", image_url: { url } }] });
      const body = JSON.stringify({ messages, stream: true }), headers = { "Content-Type": "application/json" };
      await events(await call("v1/chat/completions", signal, { method: "POST", body, headers }), (piece) => {
        signal.throwIfAborted();
        answer.said.textContent += piece;
      });
      signal.throwIfAborted();
    } catch (error) {
      if (signal.aborted && answer.said.textContent) { // stopped: the text so far stays on the page
        answer.said.textContent += " (stopped)";
      } else { // the question is still in its field
        asked.item.remove();
        answer.item.remove();
      }
      throw error;
    }
    turns.push([question, answer.said.textContent]);
    if (!answer.said.textContent) answer.said.textContent = "(no text)";
    $("question").value = "";
  });
});

async function events(answer, give) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const lines = text.split("\n\n");
    text = lines.pop();
    for (const one of lines) {
      if (one === "data: [DONE]") return;
      const event = JSON.parse(one.slice(6));
      if (event.error) throw new Error(event.error.message);
      give(event.choices[0]?.delta?.content || "");
    }
  }
}

function dataUrl(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("The picture file cannot be read."));
    reader.readAsDataURL(file);
  });
}

// ---- texts and search

$("match").addEventListener("submit", (event) => {
  event.preventDefault();
  const texts = $("texts").value.split("\n").map((text) => text.trim()).filter(Boolean);
  if (!texts.length || !state.file) return;
  work($("match"), async (signal) => {
    $("matches").hidden = true;
    const answer = await call("match", signal, form([["image", state.file], ...texts.map((text) => ["text", text])]));
    const scores = (await answer.json()).texts;
    signal.throwIfAborted();
    const rows = scores.map((score) => {
      const row = document.createElement("tr");
      for (const cell of [score.text, score.similarity.toFixed(3), `${(100 * score.match).toFixed(1)} %`])
        row.insertCell().textContent = cell;
      return row;
    });
    $("matches").tBodies[0].replaceChildren(...rows);
    $("matches").hidden = false;
  });
});

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("wanted").value.trim();
  if (text) search([["text", text]], `for “${text}”`);
});
$("alike").addEventListener("click", () => search([["image", state.file]], `similar to ${state.file.name}`));

function search(fields, about) {
  work($("search"), async (signal) => {
    const { pictures } = await (await call("search", signal, form(fields))).json();
    const items = await Promise.all(pictures.map((one) => hit(one, signal)));
    signal.throwIfAborted();
    $("count").textContent = `${pictures.length} pictures ${about}, best first`;
    $("hits").replaceChildren(...items);
  });
}

async function hit(found, signal) {
  const item = document.createElement("li"), button = document.createElement("button"), image = document.createElement("img");
  const name = document.createElement("span"), score = document.createElement("span");
  image.src = URL.createObjectURL(await (await call(`pictures/${found.id}`, signal)).blob());
  image.alt = "";
  name.textContent = found.path;
  score.textContent = found.similarity.toFixed(3);
  button.type = "button";
  button.setAttribute("aria-label", `Use ${found.path}, similarity ${found.similarity.toFixed(3)}`);
  button.append(image, name, score);
  button.addEventListener("click", () => work($("search"), async (own) => {
    const whole = await (await call(`pictures/${found.id}?whole=true`, own)).blob();
    own.throwIfAborted();
    take(new File([whole], found.path.split("/").pop(), { type: whole.type }));
    $("picture").scrollIntoView();
  }));
  item.append(button);
  return item;
}

// An example fills its field and sends the form.
for (const example of document.querySelectorAll("[data-fills]"))
  example.addEventListener("click", () => {
    const field = $(example.dataset.fills);
    field.value = example.textContent.split(" | ").join("\n");
    field.form.requestSubmit();
  });

(async () => {
  const health = await (await fetch("health")).json();
  state.can = health.can;
  const { write, match, search } = health.can;
  const does = [write && "describes pictures, answers questions", match && "compares texts", search && "searches a folder"];
  $("about").textContent = `${health.model}: ${does.filter(Boolean).join(", ")}.`;
  for (const part of document.querySelectorAll("[data-can]")) part.hidden = !state.can[part.dataset.can];
  if (!state.can.match) $("by").hidden = true;
  enable();
})().catch((error) => { $("about").textContent = `The server cannot be reached: ${error.message}`; });

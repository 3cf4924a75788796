"use strict";
// The page of `openblip2 serve`. What a model or a user wrote is only ever put in as text.
const $ = (id) => document.getElementById(id);
const state = { file: null, url: "", turns: [], can: {}, token: sessionStorage.getItem("token") || "" };

async function call(path, options = {}, retried = false) {
  const headers = { ...(options.headers || {}) };
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401 && !retried) {
    await askToken();
    return call(path, options, true);
  }
  if (!answer.ok) {
    let said = `the server answers ${answer.status}`;
    try { said = (await answer.json()).error.message; } catch { /* no JSON: the status has to do */ }
    throw new Error(said);
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

// One thing at a time: its part of the page is marked busy, and what goes wrong is said.
async function busy(element, work) {
  $("problem").hidden = true;
  element.setAttribute("aria-busy", "true");
  try { await work(); } catch (error) {
    $("problem").textContent = error.message;
    $("problem").hidden = false;
  } finally { element.removeAttribute("aria-busy"); }
}

function form(fields) {
  const data = new FormData();
  for (const [name, value] of fields) data.append(name, value);
  return { method: "POST", body: data };
}

function enable() {
  for (const button of document.querySelectorAll("[data-needs]"))
    button.disabled = !button.dataset.needs.split(" ").every((need) => need === "picture" ? state.file : state.can[need]);
}

function take(file) {
  if (!file) return;
  if (state.url) URL.revokeObjectURL(state.url);
  state.file = file;
  state.url = URL.createObjectURL(file);
  state.turns = [];
  $("turns").replaceChildren();
  $("caption").textContent = "";
  $("matches").hidden = true;
  show(state.url, file.name);
  enable();
}

function show(url, name) {
  $("shown").src = url;
  $("shown").alt = `The chosen picture, ${name}`;
  $("shown").hidden = false;
  $("hint").hidden = true;
  $("plain").hidden = url === state.url;
}

function line(list, kind, text) {
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = text;
  list.append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}

$("file").addEventListener("change", () => take($("file").files[0]));
for (const kind of ["dragover", "dragleave", "drop"])
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
document.addEventListener("paste", (event) => take([...event.clipboardData.files].find((f) => f.type.startsWith("image/"))));
$("plain").addEventListener("click", () => show(state.url, state.file.name));

$("describe").addEventListener("click", () => busy($("picture"), async () => {
  const answer = await call("caption", form([["image", state.file]]));
  $("caption").textContent = (await answer.json()).caption || "(nothing)";
}));

$("again").addEventListener("click", () => { state.turns = []; $("turns").replaceChildren(); $("question").focus(); });

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || !state.file) return;
  busy($("ask"), async () => {
    const url = await dataUrl(state.file);
    const messages = [];
    for (const [asked, said] of state.turns)
      messages.push({ role: "user", content: asked }, { role: "assistant", content: said });
    messages.push({ role: "user", content: [{ type: "text", text: question }, { type: "image_url", image_url: { url } }] });
    line($("turns"), "q", question);
    const item = line($("turns"), "a", "");
    const body = JSON.stringify({ messages, stream: true });
    const answer = await call("v1/chat/completions", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    await events(answer, (piece) => { item.textContent += piece; });
    state.turns.push([question, item.textContent]);
    if (!item.textContent) item.textContent = "(nothing)";
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
      const found = JSON.parse(one.slice(6));
      if (found.error) throw new Error(found.error.message);
      give(found.choices[0]?.delta?.content || "");
    }
  }
}

function dataUrl(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.startsWith("data:image/") ? reader.result : reader.result.replace(/^data:[^;,]*/, "data:image/any"));
    reader.onerror = () => failed(new Error("the picture cannot be read"));
    reader.readAsDataURL(file);
  });
}

$("match").addEventListener("submit", (event) => {
  event.preventDefault();
  const texts = $("texts").value.split("\n").map((text) => text.trim()).filter(Boolean);
  busy($("match"), async () => {
    const answer = await call("match", form([["image", state.file], ...texts.map((text) => ["text", text])]));
    const rows = (await answer.json()).texts.map((found) => {
      const row = document.createElement("tr");
      for (const cell of [found.text, found.similarity.toFixed(3), `${(100 * found.match).toFixed(1)} %`])
        row.insertCell().textContent = cell;
      return row;
    });
    $("matches").tBodies[0].replaceChildren(...rows);
    $("matches").hidden = false;
  });
});

$("attend").addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("attend"), async () => {
    const text = $("about-text").value.trim();
    const fields = [["image", state.file], ["by", $("by").value]];
    if (text) fields.push(["text", text]);
    const answer = await call("attend", form(fields));
    show(URL.createObjectURL(await answer.blob()), `${state.file.name}, with a map of where the model looks`);
    $("picture").scrollIntoView({ block: "nearest" });
  });
});

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  look([["text", $("wanted").value.trim()]]);
});
$("alike").addEventListener("click", () => look([["image", state.file]]));

function look(fields) {
  busy($("search"), async () => {
    const answer = await call("search", form(fields));
    const { pictures } = await answer.json();
    $("count").textContent = `${pictures.length} pictures, the best first`;
    $("hits").replaceChildren(...await Promise.all(pictures.map(hit)));
  });
}

async function hit(found) {
  const item = document.createElement("li"), button = document.createElement("button"), image = document.createElement("img");
  const name = document.createElement("span");
  image.src = URL.createObjectURL(await (await call(`pictures/${found.id}`)).blob());
  image.alt = "";
  name.textContent = `${found.path} ${found.similarity.toFixed(3)}`;
  button.type = "button";
  button.setAttribute("aria-label", `Take ${found.path}, likeness ${found.similarity.toFixed(3)}`);
  button.append(image, name);
  button.addEventListener("click", () => busy(item, async () => {
    const whole = await (await call(`pictures/${found.id}?whole=true`)).blob();
    take(new File([whole], found.path.split("/").pop(), { type: whole.type }));
    $("picture").scrollIntoView();
  }));
  item.append(button);
  return item;
}

(async () => {
  const health = await (await fetch("health")).json();
  state.can = health.can;
  $("about").textContent = `${health.model}: ${[health.can.write && "describes and answers", health.can.match && "compares", health.can.search && "searches"].filter(Boolean).join(", ")}.`;
  for (const part of document.querySelectorAll("[data-can]")) part.hidden = !state.can[part.dataset.can];
  if (!state.can.write) $("describe").hidden = true;
  if (!state.can.match) $("by").hidden = true;
  enable();
})();

// The chat: what was said, one answer at a time. Text of the model only ever becomes text nodes.

import { call, events } from "./api.js";

const $ = (id) => document.getElementById(id);
const [log, text, send, stop] = ["log", "text", "send", "stop"].map($);
let turns = []; // of {role, content}
let running = null; // the AbortController of the answer that is being written
let models = []; // names of those that can be asked
const plain = new Set(); // of them that have no chat template: they continue text

class Answer {
  constructor() {
    this.content = this.reasoning = "";
    this.item = element("li", "assistant writing");
    this.thoughts = element("details", "reasoning");
    this.thoughts.hidden = true;
    this.thoughts.append(element("summary", "", "Reasoning"), element("div"));
    this.said = element("div", "said");
    this.item.append(this.thoughts, this.said);
    append(this.item);
    this.asked = performance.now();
    this.model = models.length > 1 ? $("asked-model").value : "";
  }

  take(event) {
    this.usage = event.usage ?? this.usage;
    const [choice] = event.choices;
    if (!choice) return;
    this.reason = choice.finish_reason ?? this.reason;
    const { content = choice.text, reasoning_content: thought } = choice.delta ?? {};
    if (!content && !thought) return;
    this.first ??= performance.now();
    if (thought) {
      this.reasoning += thought;
      this.thoughts.hidden = false;
      keepAtEnd(() => this.thoughts.lastChild.append(thought));
    }
    if (content) {
      this.content += content;
      keepAtEnd(() => this.said.append(content));
    }
  }

  end(error) {
    this.item.classList.remove("writing");
    this.said.replaceChildren(...blocks(this.content));
    const notes = this.figures();
    if (error?.name === "AbortError") notes.push("stopped");
    if (this.reason === "length") notes.push("cut at its most tokens");
    if (notes.length) this.item.append(element("p", "note", notes.join(" · ")));
    if (error && error.name !== "AbortError") {
      const { hint } = error;
      const failed = element("p", "failed", hint ? `${error.message}. ${hint.cause}: ${hint.fix}.` : error.message);
      failed.role = "alert";
      this.item.append(failed);
    }
    keepAtEnd(() => {});
  }

  figures() {
    const notes = this.model ? [this.model] : [];
    const tokens = this.usage?.completion_tokens;
    if (tokens) notes.push(`${tokens} token${tokens === 1 ? "" : "s"} in ${took(performance.now() - this.asked)}`);
    if (this.first) notes.push(`the first after ${took(this.first - this.asked)}`);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (cached) notes.push(`${cached} of ${this.usage.prompt_tokens} prompt tokens cached`);
    return notes;
  }
}

/** Text between fences is code, the rest stays as it is. */
function blocks(whole) {
  return whole.split(/^```[^\n]*\n?/m).map((piece, at) => (at % 2 ? element("pre", "", piece) : piece));
}

function took(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function element(name, kind = "", content = "") {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (content) made.append(content);
  return made;
}

function append(item) {
  $("welcome").hidden = true;
  log.append(item);
  log.scrollTop = log.scrollHeight;
}

/** What grows stays in view, unless somebody has scrolled back. */
function keepAtEnd(change) {
  const at = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (at) log.scrollTop = log.scrollHeight;
}

function request(model) {
  const body = { stream: true, stream_options: { include_usage: true } };
  const [temperature, most] = [$("temperature"), $("max-tokens")];
  if (temperature.value) body.temperature = temperature.valueAsNumber;
  if (most.value) body.max_tokens = most.valueAsNumber;
  if (model) body.model = model;
  if (plain.has(model)) return ["/v1/completions", { ...body, prompt: turns.map((turn) => turn.content).join("") }];
  return ["/v1/chat/completions", { ...body, messages: turns }];
}

async function open(model, signal) {
  try {
    return await call(...request(model), signal);
  } catch (error) {
    if (error.code !== "no_chat_template" || plain.has(model)) throw error;
    plain.add(model);
    append(element("li", "note", "This model has no chat template: it continues your text."));
    return await call(...request(model), signal);
  }
}

async function ask(said) {
  const before = turns;
  turns = [...turns, { role: "user", content: said }];
  append(element("li", "user", said));
  const answer = new Answer();
  running = new AbortController();
  show();
  let failure;
  try {
    for await (const event of events(await open(answer.model, running.signal))) answer.take(event);
  } catch (error) {
    failure = error;
  }
  answer.end(failure);
  running = null;
  if (answer.content) turns = [...turns, { role: "assistant", content: answer.content }];
  else if (failure) {
    turns = before; // nothing was answered: the same may be asked again
    text.value ||= said;
  }
  show();
}

function show() {
  stop.hidden = running === null;
  send.hidden = running !== null;
  send.disabled = !text.value.trim();
  $("clear").disabled = running !== null;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const said = text.value;
  if (running || !said.trim() || !event.target.reportValidity()) return;
  text.value = "";
  ask(said);
});
text.addEventListener("input", show);
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
stop.addEventListener("click", () => {
  running?.abort();
  text.focus();
});
$("clear").addEventListener("click", () => {
  turns = [];
  log.replaceChildren();
  $("welcome").hidden = false;
  text.focus();
});

/** Which models there are, and which of them chat: told once they are known, and when that changes. */
document.addEventListener("models", ({ detail }) => {
  models = detail.filter(({ task }) => task === "generate").map(({ model }) => model);
  const chosen = $("asked-model").value;
  $("asked").hidden = models.length < 2;
  $("asked-model").replaceChildren(...models.map((name) => new Option(name, name, false, name === chosen)));
  $("ask").inert = !models.length;
  if (!models.length) $("welcome").querySelector("p").textContent = `No model here chats: the task is ${detail[0].task}.`;
});

/** Narrow windows show one view at a time. */
function view() {
  const name = location.hash === "#engine" ? "engine" : "chat";
  for (const section of document.querySelectorAll("main > section")) {
    section.toggleAttribute("data-shown", section.id === name);
  }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}
window.addEventListener("hashchange", view);
view();
show();

// The live view: one small JSON a second while the tab is seen, drawn as figures and lines.

import { call } from "./api.js";

const PERIOD_MS = 1000;
const POINTS = 60;
const WIDTH = 240, HEIGHT = 64;
const $ = (id) => document.getElementById(id);
let last = null; // the sample before this one
let timer = null;

const tiles = Object.fromEntries(
  [["rate", "tokens/s"], ["steps", "steps/s"], ["wait", "oldest wait"], ["context", "context"]].map(tile),
);
const charts = [
  chart("requests", "Requests running", "one", (now) => now.engine.running),
  chart("queue", "Requests waiting", "two", (now) => now.engine.waiting),
  chart("rows", "Rows per step", "three", (now, was) => perStep(now, was, "rows")),
  chart("tokens", "Tokens per step", "four", (now, was) => perStep(now, was, "tokens")),
];
const STATES = [
  ["in use", "one", "mapped_pages", "held by requests that run"],
  ["cached", "three", "cached_pages", "text that later prompts may start with"],
  ["reusable", "four", "reusable_pages", "mapped, and free to take"],
];

function tile([name, label]) {
  const box = document.createElement("div");
  const [term, value] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = label;
  value.textContent = "–";
  value.id = `tile-${name}`;
  box.append(value, term);
  $("tiles").append(box);
  return [name, value];
}

function chart(id, label, hue, pick) {
  const card = document.createElement("article");
  const now = Object.assign(document.createElement("span"), { className: "now", id: `now-${id}`, textContent: "–" });
  const head = Object.assign(document.createElement("h2"), { textContent: label });
  const figure = document.createElement("figure");
  const top = Object.assign(document.createElement("span"), { className: "top" });
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", class: hue });
  const [area, line] = [svg("path", { class: "fill" }), svg("path", { class: "stroke" })];
  picture.append(area, line);
  figure.append(picture, top);
  card.append(now, head, figure);
  $("charts").append(card);
  const values = [];
  return (sample, before) => {
    values.push(pick(sample, before));
    if (values.length > POINTS) values.shift();
    const most = Math.max(1, ...values);
    const x = (at) => WIDTH - ((values.length - 1 - at) * WIDTH) / (POINTS - 1);
    const path = values.map((value, at) => `${x(at).toFixed(1)} ${(HEIGHT - 2 - (value / most) * (HEIGHT - 6)).toFixed(1)}`);
    line.setAttribute("d", `M${path.join("L")}`);
    area.setAttribute("d", `M${x(0).toFixed(1)} ${HEIGHT}L${path.join("L")}L${WIDTH} ${HEIGHT}Z`);
    const current = short(values.at(-1));
    now.textContent = current;
    top.textContent = short(most);
    picture.setAttribute("aria-label", `${label}: ${current} now, ${short(most)} at most in ${values.length} s`);
  };
}

function svg(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** The mean over the steps since the sample before. */
function perStep(now, was, name) {
  const steps = was ? now.engine.steps - was.engine.steps : 0;
  return steps > 0 ? (now.engine[name] - was.engine[name]) / steps : 0;
}

function short(value) {
  return value >= 100 ? Math.round(value).toLocaleString("en") : String(Math.round(value * 10) / 10);
}

function time(seconds) {
  if (seconds === null) return "–";
  return seconds >= 1 ? `${seconds.toFixed(2)} s` : `${(seconds * 1000).toPrecision(3)} ms`;
}

function bytes(value) {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(value, 1)) / 10));
  return `${Math.round((value / 1024 ** power) * 10) / 10} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

function drawPages(engine) {
  const counted = STATES.map(([label, hue, field, about]) => ({ label, hue, about, count: engine[field] }));
  const rest = engine.total_pages - counted.reduce((sum, { count }) => sum + count, 0);
  counted.push({ label: "free", hue: "", about: "not mapped", count: rest });
  $("page-size").textContent = `${engine.total_pages} of ${bytes(engine.page_bytes)}`;
  $("bar").replaceChildren(...counted.slice(0, -1).map(({ hue, count }) => {
    const part = document.createElement("span");
    part.className = hue;
    part.hidden = count === 0;
    part.style.flexBasis = `${(100 * count) / engine.total_pages}%`;
    return part;
  }));
  $("bar").setAttribute("aria-label", counted.map(({ label, count }) => `${count} ${label}`).join(", "));
  $("states").replaceChildren(...counted.map(({ label, hue, about, count }) => {
    const row = document.createElement("div");
    row.title = about;
    const [term, value] = [document.createElement("dt"), document.createElement("dd")];
    term.className = hue;
    term.textContent = label;
    value.textContent = `${count} · ${bytes(count * engine.page_bytes)}`;
    row.append(term, value);
    return row;
  }));
}

function draw(now) {
  const { engine } = now;
  $("model").textContent = now.model;
  document.title = `${now.model} · xllm`;
  health(engine.refusal ? "bad" : "ok", engine.refusal ?? (now.draining ? "shutting down" : "serving"));
  const seconds = last ? now.at - last.at : 0;
  const rate = (name) => (seconds > 0 ? short((engine[name] - last.engine[name]) / seconds) : "–");
  tiles.rate.textContent = rate("generated_tokens");
  tiles.steps.textContent = rate("steps");
  tiles.wait.textContent = engine.waiting ? time(engine.oldest_wait_s) : "–";
  tiles.context.textContent = now.max_model_len.toLocaleString("en");
  for (const update of charts) update(now, last);
  const generates = now.task === "generate";
  $("pages").hidden = $("latency").hidden = $("cache").hidden = !generates;
  $("ask").inert = !generates;
  if (generates) drawGeneration(now);
  else $("welcome").querySelector("p").textContent = `This model does not chat: its task is ${now.task}.`;
  const counts = { steps: engine.steps, preemptions: engine.preemptions, "failed steps": engine.failed_steps };
  $("counts").textContent = Object.entries(counts).map(([name, count]) => `${count.toLocaleString("en")} ${name}`).join(" · ");
}

function drawGeneration({ engine, first_token: first, per_token: token }) {
  drawPages(engine);
  $("requests").textContent = first.count ? `last ${first.count} answers` : "no answers yet";
  for (const [name, found] of [["first", first], ["token", token]]) {
    $(`${name}-p50`).textContent = time(found.p50);
    $(`${name}-p99`).textContent = time(found.p99);
  }
  const share = engine.looked_up_tokens ? engine.cached_tokens / engine.looked_up_tokens : 0;
  $("hit").textContent = engine.looked_up_tokens ? `${Math.round(share * 100)} %` : "–";
  $("hit-meter").value = share;
  const [found, asked] = [engine.cached_tokens, engine.looked_up_tokens].map((count) => count.toLocaleString("en"));
  $("hit-said").textContent = `${found} of ${asked} since the start`;
}

function health(state, words) {
  if ($("health").textContent !== words) $("health").textContent = words; // it is read aloud when it changes
  $("health").dataset.is = state;
}

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const now = await (await call("/ui/state")).json();
    draw(now);
    last = now;
  } catch (error) {
    health("bad", error.status === 401 ? "needs a key" : "not reachable");
    if (error.status === 401) return; // the key comes with an event
  }
  timer = setTimeout(poll, PERIOD_MS);
}

document.addEventListener("visibilitychange", poll);
document.addEventListener("key", poll);
poll();

// The live view: one small JSON a second while the tab is seen, drawn as figures and lines.

import { call } from "./api.js";

const PERIOD_MS = 1000;
const POINTS = 60;
const WIDTH = 240, HEIGHT = 64;
const $ = (id) => document.getElementById(id);
const SUMS = [
  "running", "waiting", "steps", "rows", "tokens", "generated_tokens", "preemptions", "failed_steps",
  "looked_up_tokens", "cached_tokens",
];
const samples = []; // the latest
let known = ""; // the models of these
let chosen = ""; // the model that is shown; empty for all
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
  return (views) => {
    const values = views.map((now, at) => pick(now, views[at - 1]));
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

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
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

/** The pages of the store that all models share, by owner and state. */
function drawPages(models) {
  const total = Math.max(...models.map(({ engine }) => engine.total_pages));
  const [{ page_bytes: size }] = models.map(({ engine }) => engine);
  const sums = STATES.map(([label, hue, field, about]) => {
    return { label, hue, about, count: models.reduce((sum, { engine }) => sum + engine[field], 0) };
  });
  const rest = Math.max(0, total - sums.reduce((sum, { count }) => sum + count, 0));
  sums.push({ label: "free", hue: "", about: "not mapped", count: rest });
  $("page-size").textContent = `${total} of ${bytes(size)}`;
  $("bars").replaceChildren(...models.flatMap((model) => owner(model, total, models.length > 1, rest)));
  $("states").replaceChildren(...sums.map(({ label, hue, about, count }) => {
    const row = document.createElement("div");
    row.title = about;
    row.append(element("dt", label, hue), element("dd", `${count} · ${bytes(count * size)}`));
    return row;
  }));
}

function owner({ model, engine }, total, several, rest) {
  const counted = STATES.map(([label, hue, field]) => [label, hue, engine[field]]);
  const bar = element("div", "", "bar");
  bar.role = "img";
  bar.append(...counted.map(([, hue, count]) => {
    const part = element("span", "", hue);
    part.hidden = count === 0;
    part.style.flexBasis = `${(100 * count) / total}%`;
    return part;
  }));
  const said = counted.map(([label, , count]) => `${count} ${label}`).join(", ");
  bar.ariaLabel = several ? `${model}: ${said}` : `${said}, ${rest} free`;
  return several ? [element("small", model, "owner"), bar] : [bar];
}

function drawEach(now, before) {
  const seconds = before ? now.at - before.at : 0;
  $("each-rows").replaceChildren(...now.models.map(({ model, task, engine, first_token: first }, at) => {
    const made = before ? engine.generated_tokens - before.models[at].engine.generated_tokens : 0;
    const rate = seconds > 0 && task === "generate" ? short(made / seconds) : "–";
    const row = document.createElement("tr");
    const head = element("th", model);
    head.scope = "row";
    const state = engine.refusal ? "fails" : engine.asleep ? "asleep" : engine.paused ? "paused" : "serves";
    const cells = [engine.running, engine.waiting, rate, time(first.p50), state];
    row.append(head, ...cells.map((cell) => element("td", cell)));
    return row;
  }));
}

/** The figures of the model that is shown, or of all together. */
function view({ at, models }) {
  const shown = models.filter(({ model }) => !chosen || model === chosen);
  const sum = (name) => shown.reduce((total, { engine }) => total + engine[name], 0);
  const engine = Object.fromEntries(SUMS.map((name) => [name, sum(name)]));
  engine.oldest_wait_s = Math.max(...shown.map((one) => one.engine.oldest_wait_s));
  return { at, shown, engine };
}

function draw() {
  const now = samples.at(-1);
  const views = samples.map(view);
  const [{ shown, engine, at }, before] = [views.at(-1), views.at(-2)];
  const [failing] = now.models.filter((one) => one.engine.refusal);
  const several = now.models.length > 1;
  const why = failing && (several ? `${failing.model}: ${failing.engine.refusal}` : failing.engine.refusal);
  health(failing ? "bad" : "ok", why ?? (now.draining ? "shutting down" : "serving"));
  const seconds = before ? at - before.at : 0;
  const rate = (name) => (seconds > 0 ? short((engine[name] - before.engine[name]) / seconds) : "–");
  tiles.rate.textContent = rate("generated_tokens");
  tiles.steps.textContent = rate("steps");
  tiles.wait.textContent = engine.waiting ? time(engine.oldest_wait_s) : "–";
  tiles.context.textContent = Math.max(...shown.map((one) => one.max_model_len)).toLocaleString("en");
  for (const update of charts) update(views);
  const owners = now.models.filter(({ task }) => task === "generate");
  const generates = shown.some(({ task }) => task === "generate");
  $("each").hidden = !several || chosen !== "";
  $("pages").hidden = !owners.length || (!several && !generates);
  $("cache").hidden = !generates;
  $("latency").hidden = !generates || shown.length > 1;
  if (several) drawEach(now, samples.at(-2));
  if (owners.length) drawPages(owners);
  if (generates) drawGeneration(shown[0], engine);
  const counts = { steps: engine.steps, preemptions: engine.preemptions, "failed steps": engine.failed_steps };
  $("counts").textContent = Object.entries(counts).map(([name, count]) => `${count.toLocaleString("en")} ${name}`).join(" · ");
}

function drawGeneration({ first_token: first, per_token: token }, engine) {
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

/** Says which models there are, the first time and after a server began again with others. */
function know(models) {
  const names = models.map(({ model, task }) => `${model} ${task}`).join("\n");
  if (names === known) return;
  known = names;
  samples.length = 0;
  chosen = models.some(({ model }) => model === chosen) ? chosen : "";
  const options = [new Option("all", "", false, !chosen), ...models.map(({ model }) => new Option(model, model, false, model === chosen))];
  $("shown-model").replaceChildren(...options);
  $("shown").hidden = models.length < 2;
  $("model").textContent = models.map(({ model }) => model).join(", ");
  document.title = models.length > 1 ? `${models.length} models · xllm` : `${models[0].model} · xllm`;
  document.dispatchEvent(new CustomEvent("models", { detail: models }));
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
    know(now.models);
    samples.push(now);
    if (samples.length > POINTS) samples.shift();
    draw();
  } catch (error) {
    health("bad", error.status === 401 ? "needs a key" : "not reachable");
    if (error.status === 401) return; // the key comes with an event
  }
  timer = setTimeout(poll, PERIOD_MS);
}

$("shown-model").addEventListener("change", (event) => {
  chosen = event.target.value;
  draw();
});
document.addEventListener("visibilitychange", poll);
document.addEventListener("key", poll);
poll();

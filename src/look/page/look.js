"use strict";
// The page: what it is set to, what it asks, and what it shows.

const at = (id) => document.getElementById(id);
const page = [...crypto.getRandomValues(new Uint32Array(2))].map((part) => part.toString(16)).join("");

let run = null; // what the run has
let look = null; // the last answer
let values = null; // a number for each token, if they are coloured
let blocks = null; // what the residual stream says, if it is read
let lastClicked = null;
const set = { student: "", system: null, user: "", gate: "everywhere", steer: null, colour: "" };
// What the controls show of the gate.
const where = { classes: [], on: [], gen: true, dose: 1, blocks: [0, 0], modules: [] };

// Asking

const running = {};

async function ask(question, each) {
  if (running[question.ask]) running[question.ask].abort();
  const stop = (running[question.ask] = new AbortController());
  const response = await fetch("ask", {
    method: "POST", signal: stop.signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ page, ...question }),
  });
  if (!response.ok) throw await response.json();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value || "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const part = JSON.parse(line);
      if (part !== null && part.error) throw part;
      each(part);
    }
    if (done) return;
  }
}

function told(problem) {
  if (problem.name === "AbortError" || problem.overtaken) return;
  const text = problem.error ? problem.error + (problem.hint ? `; hint: ${problem.hint}` : "") : "the program does not answer; is it still running?";
  status(text, true);
}

function status(text, isWrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", isWrong);
}

const setting = () => ({ student: set.student, system: set.system, user: set.user, gate: set.gate, steer: set.steer });

// The address

function toAddress() {
  const parts = new URLSearchParams({ student: set.student, user: set.user, gate: set.gate });
  if (set.system !== null) parts.set("system", set.system);
  if (set.steer) parts.set("steer", `${set.steer.coefficient}@${set.steer.layer}`);
  if (set.colour) parts.set("colour", set.colour);
  history.replaceState(null, "", "#" + parts);
}

function fromAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  set.student = parts.get("student") || run.students[0];
  set.user = parts.has("user") ? parts.get("user") : run.questions[0];
  set.gate = parts.get("gate") || "everywhere";
  set.system = parts.get("system");
  const [coefficient, layer] = (parts.get("steer") || "").split("@").map(Number);
  set.steer = Number.isFinite(coefficient) && Number.isInteger(layer) ? { layer, coefficient } : null;
  set.colour = parts.get("colour") || "";
}

// Showing

function showControls() {
  at("student").value = set.student;
  if (document.activeElement !== at("system")) at("system").value = set.system === null ? run.default_system || "" : set.system;
  if (document.activeElement !== at("user")) at("user").value = set.user;
  if (document.activeElement !== at("gate")) at("gate").value = set.gate;
  const known = Object.keys(run.contexts).find((name) => (run.contexts[name] ?? run.default_system) === at("system").value);
  at("context").value = known || "";
  at("question").value = run.questions.includes(set.user) ? set.user : "";
  at("colour").value = set.colour;
  at("dose").value = where.dose;
  at("dose-value").textContent = String(where.dose);
  at("first-block").value = where.blocks[0];
  at("last-block").value = where.blocks[1];
  for (const box of at("modules").querySelectorAll("input")) box.checked = where.modules.includes(box.value);
  at("steer").checked = set.steer !== null;
  at("steer").disabled = !run.has_direction;
  if (set.steer) {
    at("steer-block").value = set.steer.layer;
    at("coefficient").value = set.steer.coefficient;
  }
  at("coefficient-value").textContent = at("coefficient").value;
}

function showTokens() {
  const chips = look.tokens.map((token, position) => chip(position, token.text, token.class, where.on[position]));
  chips.push(chip(look.tokens.length, "answer…", "gen", where.gen));
  const focused = document.activeElement && document.activeElement.dataset.position;
  at("tokens").replaceChildren(...chips);
  if (focused !== undefined && document.activeElement === document.body && chips[focused]) chips[focused].focus();
  showValues();
}

function chip(position, text, name, isOn) {
  const made = element("button", { type: "button", "data-position": position, title: `${position} ${name}` }, element("span", {}, text === "" ? "·" : text));
  made.setAttribute("aria-pressed", String(isOn));
  made.setAttribute("aria-label", `${text}, ${name}, position ${position}`);
  made.addEventListener("click", (event) => clicked(position, event.shiftKey));
  return made;
}

function showValues() {
  const chips = [...at("tokens").children];
  const numbers = (values || []).filter((value) => value !== null);
  const most = Math.max(0, ...numbers.map(Math.abs));
  chips.forEach((chip, position) => {
    const value = values && values[position];
    paint(chip, value, most);
    if (values && position < values.length) chip.title = `${position} ${look.tokens[position].class}: ${value}`;
  });
  at("scale").textContent = values ? `up to ${most.toPrecision(3)}` : "";
}

function showClasses() {
  // A class of one token is switched at the token itself.
  const count = (members) => where.classes.filter((name) => members.includes(name)).length;
  const single = [...new Set(where.classes)].map((name) => [name, [name]]).filter(([, members]) => count(members) > 1);
  const unions = run.unions.filter(([name, members]) => count(members) > (name === "entity" ? 0 : 1));
  const button = ([name, members]) => {
    const made = element("button", { type: "button" }, name);
    made.addEventListener("click", () => switchAll(members));
    return made;
  };
  at("classes").replaceChildren(...[...unions, ...single].map(button));
}

function showLook() {
  at("models").replaceChildren(...modelsTable(look));
  at("words").replaceChildren(...wordsTable(look));
  at("next").replaceChildren(...nextTable(look));
  at("command").textContent = look.command;
  at("experiment").textContent = look.experiment;
  at("lines").hidden = look.experiment === "";
  const models = look.models.map((of) => [of.name, set.gate, look.words[0], of.logps[0], of.margin, of.logps[0] - look.models[0].logps[0], of.margin - look.models[0].margin]);
  const words = look.models.flatMap((of) => of.logps.map((logp, word) => [of.name, look.words[word], logp]));
  const tokens = look.tokens.map((token, position) => [token.position, token.id, token.text, token.class, token.dose, values ? values[position] : null]);
  const text = csv([["model", "gate", "target", "logp_target", "margin", "delta_logp", "delta_margin"], ...models]) + "\n"
    + csv([["model", "word", "logp"], ...words]) + "\n"
    + csv([["position", "id", "token", "class", "dose", set.colour || "value"], ...tokens]);
  at("csv").href = "data:text/csv;charset=utf-8," + encodeURIComponent(text);
}

// Changing

// Asks again after a change. `isGateGiven` says that the gate was typed, and the controls follow it.
async function refresh(isGateGiven = false) {
  toAddress();
  showControls();
  try {
    const begun = performance.now();
    await ask({ ask: "look", setting: setting() }, (found) => { look = found; });
    const classes = look.tokens.map((token) => token.class);
    if (isGateGiven || classes.length !== where.classes.length) {
      where.on = look.tokens.map((token) => token.dose !== 0);
      where.gen = look.generated_dose === null || look.generated_dose !== 0;
      Object.assign(where, controlsOf(set.gate, run));
    }
    where.classes = classes;
    showControls();
    showClasses();
    showTokens();
    showLook();
    const answering = where.gen ? "on" : "off";
    status(`${look.tokens.filter((token) => token.dose !== 0).length} of ${look.tokens.length} tokens on, ${answering} in the answer; ${Math.round(performance.now() - begun)} ms`);
  } catch (problem) {
    return told(problem);
  }
  await Promise.all([colour(), byBlock()]);
}

async function push() {
  const rows = [];
  const take = (layer, coefficient) => {
    set.steer = { layer, coefficient };
    set.gate = "nowhere";
    refresh(true);
  };
  try {
    await ask({ ask: "push", setting: setting() }, (row) => {
      rows.push(row);
      at("pushed").replaceChildren(...pushedTable(rows, take));
    });
  } catch (problem) {
    told(problem);
  }
}

async function byBlock() {
  if (!at("by-block").checked) {
    blocks = null;
    at("blocks").replaceChildren();
    at("map").replaceChildren();
    return;
  }
  try {
    await ask({ ask: "by_block", setting: setting() }, (found) => { blocks = found; });
    at("blocks").replaceChildren(...blocksTable(blocks));
    showMap();
  } catch (problem) {
    told(problem);
  }
}

function showMap() {
  if (blocks) at("map").replaceChildren(...mapTable(blocks[at("cells").value], look.tokens));
}

async function colour() {
  const note = { only: "nats; orange raises the margin, blue lowers it", except: "nats; orange raises the margin, blue lowers it", gradient: "norm", log_p: "nats", divergence: "nats" };
  at("colour-note").textContent = set.colour ? note[set.colour] : "";
  if (!set.colour) {
    values = null;
    return showValues();
  }
  try {
    await ask({ ask: "quantity", setting: setting(), quantity: set.colour }, (found) => { values = found; });
    showValues();
    showLook();
  } catch (problem) {
    told(problem);
  }
}

function switched() {
  set.gate = gateText(where, run);
  refresh();
}

function clicked(position, isSpan) {
  const isOn = (of) => (of === where.on.length ? where.gen : where.on[of]);
  const to = isSpan && lastClicked !== null ? isOn(lastClicked) : !isOn(position);
  const [from, end] = isSpan && lastClicked !== null ? [Math.min(position, lastClicked), Math.max(position, lastClicked)] : [position, position];
  for (let of = from; of <= end; of++) {
    if (of === where.on.length) where.gen = to;
    else where.on[of] = to;
  }
  lastClicked = position;
  switched();
}

// Switches all tokens of the classes on, or off if they are on already.
function switchAll(members) {
  const chosen = where.classes.map((name) => members.includes(name));
  const to = !chosen.every((one, of) => !one || where.on[of]);
  where.on = where.on.map((on, of) => (chosen[of] ? to : on));
  switched();
}

function allTo(on, gen) {
  where.on = where.on.map(on);
  where.gen = gen;
  switched();
}

async function draw() {
  const list = at("answers");
  list.replaceChildren();
  const counts = new Map();
  const settings = { n: Number(at("n").value), temperature: Number(at("temperature").value), seed: Number(at("seed").value), max_new_tokens: 64 };
  const show = ({ text, stopped }) => {
    const whole = text + (stopped ? "" : " …");
    counts.set(whole, (counts.get(whole) || 0) + 1);
    const sorted = [...counts].sort((a, b) => b[1] - a[1]);
    list.replaceChildren(...sorted.map(([answer, count]) => element("li", {}, `${count} × ${answer}`)));
  };
  try {
    await ask({ ask: "draw", setting: setting(), draw: settings }, show);
  } catch (problem) {
    told(problem);
  }
}

// Beginning

function debounced(change, delay = 250) {
  let timer = null;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(change, delay);
  };
}

function listen() {
  at("student").addEventListener("change", () => { set.student = at("student").value; refresh(); });
  const typed = debounced(() => {
    set.system = at("system").value === (run.default_system || "") ? null : at("system").value;
    set.user = at("user").value;
    refresh(true);
  });
  at("system").addEventListener("input", typed);
  at("user").addEventListener("input", typed);
  at("context").addEventListener("change", () => {
    if (at("context").value === "") return;
    set.system = run.contexts[at("context").value];
    refresh(true);
  });
  at("question").addEventListener("change", () => {
    if (at("question").value === "") return;
    set.user = at("question").value;
    refresh(true);
  });
  at("gate").addEventListener("input", debounced(() => { set.gate = at("gate").value; refresh(true); }));
  at("colour").addEventListener("change", () => { set.colour = at("colour").value; toAddress(); colour(); });
  at("everywhere").addEventListener("click", () => allTo(() => true, true));
  at("nowhere").addEventListener("click", () => allTo(() => false, false));
  at("invert").addEventListener("click", () => allTo((on) => !on, !where.gen));
  at("dose").addEventListener("input", () => { where.dose = Number(at("dose").value); switched(); });
  const blocks = () => {
    const [first, last] = [Number(at("first-block").value), Number(at("last-block").value)];
    where.blocks = [Math.max(0, Math.min(first, last)), Math.min(run.n_layers - 1, Math.max(first, last))];
    switched();
  };
  at("first-block").addEventListener("change", blocks);
  at("last-block").addEventListener("change", blocks);
  const steered = () => {
    const [layer, coefficient] = [Number(at("steer-block").value), Number(at("coefficient").value)];
    set.steer = at("steer").checked ? { layer, coefficient } : null;
    refresh();
  };
  for (const id of ["steer", "steer-block"]) at(id).addEventListener("change", steered);
  at("coefficient").addEventListener("input", steered);
  at("draw").addEventListener("click", draw);
  at("by-block").addEventListener("change", byBlock);
  at("push").addEventListener("click", push);
  at("push").disabled = !run.has_direction;
  at("cells").addEventListener("change", showMap);
  at("tokens").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step && at("tokens").children[Number(event.target.dataset.position) + step];
    if (next) { next.focus(); event.preventDefault(); }
  });
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => navigator.clipboard.writeText(at(button.dataset.copy).textContent));
  }
  window.addEventListener("hashchange", () => { fromAddress(); refresh(true); });
}

function options(id, entries) {
  at(id).replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
}

async function begin() {
  await ask({ ask: "run" }, (found) => { run = found; });
  document.title = `${run.run} · undertone look`;
  at("run").textContent = `${run.run}: ${run.model}, target ${run.target}`;
  options("student", run.students.map((name) => [name, name]));
  options("context", [["", "(own text)"], ...Object.keys(run.contexts).map((name) => [name, name])]);
  options("question", [["", "(own text)"], ...run.questions.map((text) => [text, text])]);
  for (const id of ["first-block", "last-block", "steer-block"]) at(id).max = run.n_layers - 1;
  const box = (name) => {
    const input = element("input", { type: "checkbox", value: name, checked: true });
    input.addEventListener("change", () => {
      where.modules = [...at("modules").querySelectorAll("input:checked")].map((checked) => checked.value);
      switched();
    });
    return element("label", {}, input, ` ${name}`);
  };
  at("modules").replaceChildren(...run.modules.map(box));
  fromAddress();
  listen();
  await refresh(true);
}

begin().catch(told);

"use strict";
// The page: what it is set to, what it asks, and what it shows.

const at = (id) => document.getElementById(id);
const page = [...crypto.getRandomValues(new Uint32Array(2))].map((part) => part.toString(16)).join("");

let run = null; // what the run has
let chat = null; // the tokens of the setting, its gate and its command
let shown = null; // all of the last answer, with the setting that it answers
let values = null; // a number for each token, with its kind and setting
let blocks = null; // what the residual stream says, if it is read
let lastClicked = null;
const set = { student: "", system: null, user: "", gate: "everywhere", steer: null, colour: "" };
// What the chips and controls show of the gate: each answer says it anew.
const where = { classes: [], on: [], gen: true, dose: 1, blocks: [0, 0], modules: [], isShown: true };

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

function stop(kind) {
  if (running[kind]) running[kind].abort();
}

function told(problem) {
  if (problem.name === "AbortError" || problem.overtaken) return;
  if (problem.error) status(problem.error + (problem.hint ? `; hint: ${problem.hint}` : ""), true);
  else if (problem.name === "TypeError" && /fetch|network/i.test(problem.message)) status("the program does not answer; is it still running?", true);
  else status(`the page failed: ${problem.message}`, true);
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
  try {
    history.replaceState(null, "", "#" + parts);
  } catch (problem) {
    // A browser may limit how often an address changes; the next change sets it.
  }
}

function fromAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  set.student = parts.get("student") || run.students[0].name;
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
  at("context").value = Object.keys(run.contexts).find((name) => run.contexts[name] === set.system) || "";
  at("question").value = run.questions.includes(set.user) ? set.user : "";
  at("colour").value = set.colour;
  at("dose").min = Math.min(-1, where.dose);
  at("dose").max = Math.max(3, where.dose);
  at("dose").value = where.dose;
  at("dose-value").textContent = String(where.dose);
  at("first-block").value = where.blocks[0];
  at("last-block").value = where.blocks[1];
  for (const box of at("modules").querySelectorAll("input")) box.checked = where.modules.includes(box.value);
  for (const of of document.querySelectorAll("#classes button, #invert, #dose, #first-block, #last-block, #modules input")) of.disabled = !where.isShown;
  at("typed").hidden = where.isShown;
  at("steer").checked = set.steer !== null;
  at("steer").disabled = !run.has_direction;
  if (set.steer) {
    at("steer-block").value = set.steer.layer;
    if (document.activeElement !== at("coefficient")) at("coefficient").value = set.steer.coefficient;
  }
}

function showTokens() {
  const chips = chat.tokens.map((token, position) => chip(position, token.text, token.class, where.on[position]));
  chips.push(chip(chat.tokens.length, "answer…", "gen", where.gen));
  const focused = document.activeElement && document.activeElement.dataset.position;
  at("tokens").replaceChildren(...chips);
  if (focused !== undefined && chips[focused]) chips[focused].focus();
  showValues();
}

function chip(position, text, name, isOn) {
  const made = element("button", { type: "button", "data-position": position, title: `${position} ${name}`, disabled: !where.isShown }, element("span", {}, text === "" ? "·" : text));
  made.setAttribute("aria-pressed", String(isOn));
  made.setAttribute("aria-label", `${text}, ${name}, position ${position}`);
  made.addEventListener("click", (event) => clicked(position, event.shiftKey));
  return made;
}

function showValues() {
  const numbers = values ? values.numbers : [];
  const most = Math.max(0, ...numbers.filter((value) => value !== null).map(Math.abs));
  [...at("tokens").children].forEach((chip, position) => {
    paint(chip, numbers[position], most);
    if (position < numbers.length) chip.title = `${position} ${where.classes[position]}: ${numbers[position]}`;
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
  at("models").replaceChildren(...modelsTable(shown));
  at("words").replaceChildren(...wordsTable(shown));
  at("next").replaceChildren(...nextTable(shown));
  at("command").textContent = shown.command;
  at("experiment").textContent = shown.experiment;
  at("lines").hidden = shown.experiment === "";
  showCsv();
}

function showCsv() {
  const { setting: { student, system, user, gate, steer }, words, models, tokens } = shown;
  const isSame = values && sameSetting(values.setting, shown.setting);
  const chatted = [["student", "system", "user", "gate", "steer"], [student, system, user, gate, steer ? `${steer.coefficient}@${steer.layer}` : ""]];
  const changes = models.map((of) => [of.name, words[0], of.logps[0], of.margin, of.logps[0] - models[0].logps[0], of.margin - models[0].margin]);
  const byWord = models.flatMap((of) => of.logps.map((logp, word) => [of.name, words[word], logp]));
  const byToken = tokens.map((token, position) => [token.position, token.id, token.text, token.class, token.dose, isSame ? values.numbers[position] : null]);
  const text = [
    csv(chatted), csv([["model", "target", "logp_target", "margin", "delta_logp", "delta_margin"], ...changes]),
    csv([["model", "word", "logp"], ...byWord]), csv([["position", "id", "token", "class", "dose", isSame ? values.kind : "value"], ...byToken]),
  ].join("\n");
  at("csv").href = "data:text/csv;charset=utf-8," + encodeURIComponent(text);
}

const sameSetting = (one, other) => JSON.stringify(one) === JSON.stringify(other);

// What a table was made with, in words.
const described = ({ student, user, gate, steer }) =>
  `${student}, ${gate}${steer ? `, direction ${steer.coefficient} times after block ${steer.layer}` : ""}: “${user}”`;

function stale(isStale) {
  for (const of of document.querySelectorAll(".result")) of.classList.toggle("stale", isStale);
}

// Changing

// Asks again after a change.
async function refresh() {
  toAddress();
  showControls();
  stop("quantity");
  stop("by_block");
  stale(true); // until this setting's numbers are there
  const asked = setting();
  try {
    const begun = performance.now();
    const parts = { setting: asked };
    await ask({ ask: "look", setting: asked }, (part) => {
      Object.assign(parts, part);
      if (part.tokens) take(part);
    });
    shown = parts;
    showLook();
    stale(false);
    const on = chat.tokens.filter((token) => token.dose !== 0).length;
    const generated = chat.gate.generated === null ? "by id" : chat.gate.generated && chat.gate.dose !== 0 ? "on" : "off";
    const elsewhere = chat.gate.acts_elsewhere ? " in the blocks and projections that it names, on at all tokens in the others" : "";
    status(`${on} of ${chat.tokens.length} tokens on, ${generated} in the answer${elsewhere}; ${Math.round(performance.now() - begun)} ms`);
  } catch (problem) {
    told(problem);
    // A gate that is refused in the address leaves no tokens to click on.
    if (!chat && problem.error) await ask({ ask: "look", setting: { ...asked, gate: "everywhere", steer: null } }, (part) => { if (part.tokens) take(part); }).catch(told);
    return;
  }
  await Promise.all([colour(), byBlock()]);
}

// Takes over what an answer says of tokens and gate.
function take(part) {
  const ids = (of) => of.tokens.map((token) => token.id).join();
  if (!chat || ids(chat) !== ids(part)) {
    lastClicked = null;
    values = null;
  }
  chat = part;
  const { dose, layers, modules, generated, acts_elsewhere: elsewhere } = part.gate;
  const isSpan = layers.length > 0 && layers[layers.length - 1] - layers[0] === layers.length - 1;
  Object.assign(where, {
    classes: part.tokens.map((token) => token.class), on: part.tokens.map((token) => token.selected), gen: generated === true,
    dose, blocks: isSpan ? [layers[0], layers[layers.length - 1]] : [0, run.n_layers - 1], modules,
    isShown: isSpan && !elsewhere && generated !== null,
  });
  showClasses();
  showControls();
  showTokens();
}

async function push() {
  const rows = [];
  const asked = setting();
  const take = (layer, coefficient) => {
    set.steer = { layer, coefficient };
    set.gate = "nowhere";
    refresh();
  };
  at("pushed-of").textContent = `Asked: “${asked.user}”`;
  try {
    await ask({ ask: "push", setting: asked }, (row) => {
      rows.push(row);
      at("pushed").replaceChildren(...pushedTable(rows, take));
    });
  } catch (problem) {
    told(problem);
  }
}

async function byBlock() {
  if (!at("by-block").checked) {
    stop("by_block");
    blocks = null;
    at("blocks").replaceChildren();
    at("map").replaceChildren();
    return;
  }
  try {
    await ask({ ask: "by_block", setting: setting() }, (found) => { blocks = { ...found, tokens: chat.tokens }; });
    at("blocks").replaceChildren(...blocksTable(blocks, run.target));
    showMap();
  } catch (problem) {
    told(problem);
  }
}

function showMap() {
  if (blocks) at("map").replaceChildren(...mapTable(blocks[at("cells").value], blocks.tokens));
}

async function colour() {
  const note = { only: "nats; orange raises the margin, blue lowers it", except: "nats; orange raises the margin, blue lowers it", gradient: "norm", log_p: "nats", divergence: "nats" };
  const [kind, asked] = [set.colour, setting()];
  at("colour-note").textContent = kind ? note[kind] : "";
  if (!values || values.kind !== kind) {
    values = null;
    showValues();
  }
  if (!kind) return stop("quantity");
  try {
    await ask({ ask: "quantity", setting: asked, quantity: kind }, (numbers) => { values = { kind, setting: asked, numbers }; });
    showValues();
    if (shown) showCsv();
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
  const begun = isSpan && lastClicked !== null ? Math.min(lastClicked, where.on.length) : null;
  const to = begun === null ? !isOn(position) : isOn(begun);
  const [from, end] = begun === null ? [position, position] : [Math.min(position, begun), Math.max(position, begun)];
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

async function draw() {
  const list = at("answers");
  const asked = setting();
  list.replaceChildren();
  at("answers-of").textContent = described(asked);
  const counts = new Map();
  const settings = { n: Number(at("n").value), temperature: Number(at("temperature").value), seed: Number(at("seed").value), max_new_tokens: 64 };
  const show = ({ text, stopped }) => {
    const whole = text + (stopped ? "" : " …");
    counts.set(whole, (counts.get(whole) || 0) + 1);
    const sorted = [...counts].sort((a, b) => b[1] - a[1]);
    list.replaceChildren(...sorted.map(([answer, count]) => element("li", {}, `${count} × ${answer}`)));
  };
  try {
    await ask({ ask: "draw", setting: asked, draw: settings }, show);
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
  at("system").addEventListener("input", debounced(() => {
    set.system = at("system").value === run.default_system ? null : at("system").value;
    refresh();
  }));
  at("user").addEventListener("input", debounced(() => { set.user = at("user").value; refresh(); }));
  at("context").addEventListener("change", () => {
    if (at("context").value === "") return;
    set.system = run.contexts[at("context").value];
    refresh();
  });
  at("question").addEventListener("change", () => {
    if (at("question").value === "") return;
    set.user = at("question").value;
    refresh();
  });
  at("gate").addEventListener("input", debounced(() => { set.gate = at("gate").value; refresh(); }));
  at("colour").addEventListener("change", () => { set.colour = at("colour").value; toAddress(); colour(); });
  for (const gate of ["everywhere", "nowhere"]) at(gate).addEventListener("click", () => { set.gate = gate; refresh(); });
  at("invert").addEventListener("click", () => {
    where.on = where.on.map((on) => !on);
    where.gen = !where.gen;
    switched();
  });
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
    set.steer = at("steer").checked && Number.isFinite(coefficient) ? { layer, coefficient } : null;
    refresh();
  };
  for (const id of ["steer", "steer-block", "coefficient"]) at(id).addEventListener("change", steered);
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
  window.addEventListener("hashchange", () => { fromAddress(); refresh(); });
}

function options(id, entries) {
  at(id).replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
}

async function begin() {
  await ask({ ask: "run" }, (found) => { run = found; });
  document.title = `${run.run} · undertone look`;
  at("run").textContent = `${run.run}: ${run.model}, target ${run.target}`;
  options("student", run.students.map(({ name, target }) => [name, target === run.target ? name : `${name} (learned ${target})`]));
  options("context", [["", "(own text)"], ...Object.keys(run.contexts).map((name) => [name, name])]);
  options("question", [["", "(own text)"], ...run.questions.map((text) => [text, text])]);
  for (const id of ["first-block", "last-block", "steer-block"]) at(id).max = run.n_layers - 1;
  const box = (name) => {
    const input = element("input", { type: "checkbox", value: name, checked: true });
    input.addEventListener("change", () => {
      const checked = [...at("modules").querySelectorAll("input:checked")].map((of) => of.value);
      if (checked.length === 0) input.checked = true; // a gate names one projection at least
      else {
        where.modules = checked;
        switched();
      }
    });
    return element("label", {}, input, ` ${name}`);
  };
  at("modules").replaceChildren(...run.modules.map(box));
  Object.assign(where, { blocks: [0, run.n_layers - 1], modules: run.modules });
  fromAddress();
  listen();
  await refresh();
}

begin().catch(told);

"use strict";
// Tables, bars and colours, made of elements and text: nothing that a model or a user wrote is read as HTML.

function element(name, properties, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties || {})) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const KINDS = { base: "base", "control student": "control", "this setting": "setting" };

// The colour class of a model: the base, the control student, the setting, or the student.
const kindOf = (name) => "of-" + (KINDS[name] || "student");

const signed = (value) => (value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3));

function probability(p) {
  if (p === 0 || p >= 1e-4) return p.toFixed(4);
  return p.toExponential(1);
}

function key(text, name = text) {
  return element("span", {}, element("span", { className: "key " + kindOf(name) }), text);
}

function head(...names) {
  const cell = (name) => element("th", { scope: "col" }, typeof name === "string" ? name : name);
  return element("thead", {}, element("tr", {}, ...names.map(cell)));
}

// Each model's log p and margin, and how they differ from the base's and the student's.
function modelsTable(look) {
  const target = look.words[0];
  const [base, student] = look.models;
  const cells = (of) => {
    const logp = of.logps[0];
    const numbers = [
      ["p", probability(Math.exp(logp))], ["logp_target", signed(logp)], ["delta_logp", signed(logp - base.logps[0])],
      ["margin", signed(of.margin)], ["delta_margin", signed(of.margin - base.margin)],
      ["delta_margin_student", signed(of.margin - student.margin)],
    ];
    return numbers.map(([name, text]) => element("td", { "data-column": name }, text));
  };
  const row = (of) => element("tr", { "data-model": of.name, className: of.name === "this setting" ? "target" : "" },
    element("th", { scope: "row" }, key(of.name)), ...cells(of));
  const title = head("", `p(${target})`, `log p(${target})`, "− base", "margin", "− base", "− student");
  return [title, element("tbody", {}, ...look.models.map(row))];
}

// A row a word: a bar a model, and the setting's number.
function wordsTable(look) {
  const p = look.models.map((of) => of.logps.map(Math.exp));
  const most = Math.max(...p.flat(), 1e-9);
  const others = [...look.words.keys()].slice(1).sort((a, b) => p[0][b] - p[0][a]);
  const row = (at) => {
    const bars = look.models.map((of, model) => {
      const bar = element("div", { className: "bar " + kindOf(of.name) });
      bar.style.width = `${(100 * p[model][at]) / most}%`;
      return bar;
    });
    const numbers = look.models.map((of, model) =>
      element("td", { "data-model": of.name, "data-logp": of.logps[at] }, probability(p[model][at])));
    return element("tr", { className: at === 0 ? "target" : "", "data-word": look.words[at] },
      element("th", { scope: "row" }, look.words[at]), element("td", { className: "bars", "aria-hidden": "true" }, ...bars), ...numbers);
  };
  const title = head("word", "", ...look.models.map((of) => key(of.name)));
  return [title, element("tbody", {}, ...[0, ...others].map(row))];
}

function nextTable(look) {
  const row = (token) => element("tr", {},
    element("th", { scope: "row" }, JSON.stringify(token.text)), ...token.p.map((p) => element("td", {}, probability(p))));
  return [head("token", ...look.models.map((of) => key(of.name))), element("tbody", {}, ...look.first_tokens.map(row))];
}

// Orange above zero, blue below; strength by the largest absolute value. Light enough for dark letters.
function paint(chip, value, most) {
  const hasValue = value !== null && value !== undefined && most > 0;
  chip.classList.toggle("painted", hasValue);
  const share = hasValue ? Math.min(1, Math.abs(value) / most) : 0;
  const [hue, depth] = value >= 0 ? [25, 40] : [215, 32];
  chip.style.backgroundColor = hasValue ? `hsl(${hue} 85% ${96 - depth * share}%)` : "";
}

// A row for each kind of direction and block; `take` is called with a cell's block and coefficient.
function pushedTable(rows, take) {
  const most = Math.max(...rows.flatMap((row) => row.delta_margin.map(Math.abs)));
  const cell = (row, value, at) => {
    const made = element("td", { className: "pushed", "data-value": value });
    if (row.kind === "learned") {
      const button = element("button", { type: "button" }, signed(value));
      button.setAttribute("aria-label", `block ${row.layer}, ${row.coefficients[at]} times: ${signed(value)}`);
      button.addEventListener("click", () => take(row.layer, row.coefficients[at]));
      made.append(button);
    } else made.append(signed(value));
    paint(made, value, most);
    return made;
  };
  const line = (row) => element("tr", { "data-kind": row.kind }, element("th", { scope: "row" }, `${row.kind}, block ${row.layer}`),
    ...row.delta_margin.map((value, at) => cell(row, value, at)));
  const sorted = [...rows].sort((a, b) => a.kind.localeCompare(b.kind) || a.layer - b.layer);
  return [head("direction", ...rows[0].coefficients.map((of) => `${of} ×`)), element("tbody", {}, ...sorted.map(line))];
}

// Each model after each block, at the last token.
function blocksTable(found, target) {
  const names = found.models.flatMap((of) => [key(`${of.name}: log p of ${target}'s first token`, of.name), "rank", "top token"]);
  const row = (layer) => element("tr", { "data-layer": layer }, element("th", { scope: "row" }, String(layer)),
    ...found.models.flatMap((of) => [
      element("td", { "data-logp": of.logp_first[layer] }, signed(of.logp_first[layer])),
      element("td", {}, String(of.rank_first[layer])), element("td", {}, JSON.stringify(of.top[layer])),
    ]));
  return [head("block", ...names), element("tbody", {}, ...found.models[0].logp_first.map((_, layer) => row(layer)))];
}

// A coloured cell for each block and token, the last block on top.
function mapTable(values, tokens) {
  const most = Math.max(...values.flat().map(Math.abs));
  const cell = (value, at) => {
    const made = element("td", { className: "cell", title: `${tokens[at].text} ${value}` });
    paint(made, value, most);
    return made;
  };
  const row = (layer) => element("tr", {}, element("th", { scope: "row" }, String(layer)), ...values[layer].map(cell));
  const names = tokens.map((token) => element("span", { className: "upright" }, token.text));
  return [element("caption", {}, `up to ${most.toPrecision(3)}`), head("block", ...names),
    element("tbody", {}, ...[...values.keys()].reverse().map(row))];
}

function csv(rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

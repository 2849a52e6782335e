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

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

function probability(p) {
  if (p === 0 || p >= 1e-4) return p.toFixed(4);
  return p.toExponential(1);
}

function key(name) {
  return element("span", {}, element("span", { className: "key " + kindOf(name) }), name);
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

function csv(rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

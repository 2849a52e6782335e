"use strict";
// A gate as text, from what is switched on.

// Names for the chosen tokens: classes where all of their tokens are chosen, positions for the others. `unions` has
// names of several classes, the widest first.
function namesOf(classes, chosen, unions) {
  const left = new Set([...chosen.keys()].filter((at) => chosen[at]));
  const names = [];
  const take = (name, members) => {
    const of = [...classes.keys()].filter((at) => members.includes(classes[at]));
    if (of.length > 0 && of.every((at) => chosen[at]) && of.some((at) => left.has(at))) {
      names.push(name);
      of.forEach((at) => left.delete(at));
    }
  };
  unions.forEach(([name, members]) => take(name, members));
  [...new Set(classes)].forEach((name) => take(name, [name]));
  const ranges = [];
  for (const at of [...left].sort((a, b) => a - b)) {
    const last = ranges[ranges.length - 1];
    if (last && last[1] === at) last[1] = at + 1;
    else ranges.push([at, at + 1]);
  }
  const positions = ranges.map(([from, to]) => (to === from + 1 ? `${from}` : `${from}..${to}`));
  if (positions.length > 0) names.push(`positions(${positions.join(",")})`);
  return names;
}

// The gate of what is switched on. `where.classes` and `where.on` have an entry a token; `where.gen` is for generated
// tokens; `where.blocks` is the first and the last block, `where.modules` the projections' short names.
function gateText(where, run) {
  const { classes, on, gen, dose, blocks, modules } = where;
  if (!gen && on.every((one) => !one)) return "nowhere";
  const factors = [];
  if (blocks[0] > 0 || blocks[1] < run.n_layers - 1) factors.push(`layers(${blocks[0]}..${blocks[1] + 1})`);
  if (modules.length < run.modules.length) factors.push(`modules(${modules.join(",")})`);
  const times = dose === 1 ? [] : [String(dose)];
  if (gen && on.every((one) => one)) {
    return factors.length > 0 ? "only:" + [...factors, ...times].join("*") : ["everywhere", ...times].join("*");
  }
  if (gen && factors.length === 0) {
    return "except:" + [namesOf(classes, on.map((one) => !one), run.unions).join("+"), ...times].join("*");
  }
  const names = namesOf(classes, on, run.unions);
  if (gen) names.push("gen");
  return "only:" + [names.join("+"), ...factors, ...times].join("*");
}

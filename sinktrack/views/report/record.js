// One record: its circuit, heads, shares and largest parts.

const MOST_BARS = 16;

/** Attention to P0 by block and head, as packed by the report. */
const unpacked = (record, blocks) => {
  const bytes = atob(record.heads);
  const heads = bytes.length / 2 / blocks;
  const value = (i) => bytes.charCodeAt(2 * i) + 256 * bytes.charCodeAt(2 * i + 1);
  return range(blocks).map((block) => range(heads).map((head) => {
    const packed = value(block * heads + head);
    return packed === 65535 ? null : packed / 65534;
  }));
};

const stepOf = () => `step ${count(shownRecord().step)}`;
const PACKED = "p0_attention";
/** Values by block and head of a field; null where this record holds none. */
const byHead = (record, name) => (name === PACKED ? unpacked(record, shown().model.blocks) : record.by_head?.[name] ?? null);

const drawHeads = () => {
  const held = [PACKED, ...Object.keys(fields).filter((name) => shown().records.some((record) => record.by_head?.[name]))];
  offerFields("of_heads", held, PACKED);
  const name = $("of_heads").value;
  const { help, form, scale, axes, unit } = fields[name];
  const { blocks } = shown().model;
  const z = byHead(shownRecord(), name);
  $("heads_help").textContent = z ? help : "This record was left out of it to save room; others have it, the last always.";
  const rows = z ?? range(blocks).map(() => [null]);
  const width = largest(rows.map((row) => row?.length ?? 0), 1);
  const logarithmic = scale === "log";
  const shade = (value) => (value === null || value === undefined ? null : logarithmic ? Math.log10(value) : value);
  const few = (number) => (number > 16 ? {} : { dtick: 1 });
  Plotly.react("heads", [{
    type: "heatmap", x: range(width), y: range(blocks), z: rows.map((row) => range(width).map((head) => shade(row?.[head]))),
    customdata: rows.map((row) => range(width).map((head) => row?.[head] ?? null)), hoverongaps: false, colorscale: scaleOf(heats()),
    ...(["probability", "share"].includes(unit) ? { zmin: 0, zmax: 1 } : {}),
    colorbar: { ...bar(titled(name)), ...(logarithmic ? { tickvals: range(9).map((power) => power - 4), ticktext: range(9).map((power) => String(10 ** (power - 4))) } : {}) },
    hovertemplate: `${sentence(escaped(fields[name].title))}, ${stepOf()}, block %{y}, ${axes[1] === "kv_head" ? "KV head" : "head"} %{x}: %{customdata:${name === PACKED ? ".4f" : d3form(form)}}${unitOf(name)}<extra></extra>`, xgap: 1, ygap: 1,
  }], layout({
    plot_bgcolor: colour("gap"), xaxis: axis({ title: axes[1] === "kv_head" ? "KV head" : "head", showgrid: false, zeroline: false, ...few(width) }),
    yaxis: axis({ title: "block", showgrid: false, zeroline: false, autorange: "reversed", ...few(blocks) }),
  }), config);
};

const label = ([kind, block]) => words(kind) + (block === null ? "" : ` ${block}`);
const largestShares = (shares) => {
  if (shares.length <= MOST_BARS) return shares;
  const least = shares.map((part) => Math.abs(part[2])).sort((a, b) => b - a)[MOST_BARS - 1];
  const rest = shares.filter((part) => Math.abs(part[2]) < least);
  return [...shares.filter((part) => !rest.includes(part)), [`the other ${rest.length}`, null, rest.reduce((sum, part) => sum + part[2], 0)]];
};

const drawShares = () => {
  const parts = largestShares(shownRecord().shares);
  const { blocks } = shown().model;
  const shares = parts.map((part) => part[2]);
  const [low, high] = [Math.min(0, ...shares), Math.max(1, ...shares)];
  const room = Math.max(0.12, 58 / Math.max(120, $("shares").clientWidth - 190)) * (high - low);
  const slots = Math.max(parts.length, 4);
  $("heads").style.height = `${Math.max(400, 60 + 26 * slots)}px`;
  Plotly.react("shares", [{
    type: "bar", orientation: "h", x: shares, y: parts.map(label), text: shares.map(percent), textposition: "outside", cliponaxis: false,
    textfont: { color: colour("muted") }, hovertemplate: `Share of the P0 state, ${stepOf()}, %{y}: %{x:.2%}<extra></extra>`,
    marker: { color: parts.map(([, block]) => (block === null ? colour("muted") : depthColour(block, blocks))), opacity: shownRecord().formed || shownRecord().untold ? 1 : 0.35 },
  }], layout({
    height: 60 + 26 * slots, showlegend: false, bargap: 0.25,
    xaxis: axis({ title: "share", tickformat: ".0%", range: [low - (low < 0 ? 1.5 * room : 0), high + room] }),
    yaxis: axis({ range: [slots - 0.5, -0.5], showgrid: false }),
  }), config);
};

const drawFirstTokens = () => {
  const record = shownRecord();
  const [low, middle, high] = record.first_tokens;
  const blocks = range(middle.length).filter((block) => middle[block] !== null);
  const at = (values) => blocks.map((block) => values[block]);
  const tone = colour("accent");
  const line = (name, values, colour_) => ({
    name, x: blocks, y: at(values), mode: "lines+markers", line: { color: colour_, width: 2 }, marker: { color: colour_, size: 5 },
    hovertemplate: `Norm ratio, ${stepOf()}, block %{x}: %{y:.3g}<extra>${name}</extra>`,
  });
  Plotly.react("first_tokens", [
    {
      x: [...blocks, ...blocks.toReversed()], y: [...at(high), ...at(low).toReversed()], fill: "toself", fillcolor: tone,
      mode: "lines", line: { color: tone, width: 1 }, opacity: 0.2, hoverinfo: "skip", showlegend: false,
    },
    line("distinct first tokens", middle, tone), line("the probe", record.norm_ratio, colour("muted")),
  ], layout({
    xaxis: axis({ title: "block", ...(blocks.length > 16 ? {} : { dtick: 1 }) }),
    yaxis: axis({ title: fields.norm_ratio.title, type: fields.norm_ratio.scale, ...logTicks([...at(low), ...at(high), ...record.norm_ratio], 6) }),
  }), config);
};

/** The position card: sink rates of the probe with other first tokens, side by side. */
const drawCard = () => {
  const { card, card_says } = shownRecord();
  $("card_of").hidden = !card;
  if (!card) return;
  $("card_says").textContent = card_says;
  const names = card.map(([name]) => (narrow() ? sentence(name).replaceAll(" ", "<br>") : sentence(name)));
  const bars = [["sink_rate", colour("accent"), "from block 0"], ["sink_rate_from_2", colour("muted"), "from block 2"]].map(([field, tone, name]) => {
    const rates = card.map(([, found]) => found?.[field] ?? null);
    const bounds = card.map(([, found], i) => found?.intervals[field] ?? [rates[i], rates[i]]);
    return {
      type: "bar", name, x: names, y: rates, marker: { color: tone }, text: rates.map((rate) => (rate === null || narrow() ? "" : percent(rate))), textposition: "outside", cliponaxis: false,
      error_y: { type: "data", symmetric: false, array: bounds.map(([, high], i) => high - rates[i]), arrayminus: bounds.map(([low], i) => rates[i] - low), color: colour("muted"), thickness: 1 },
      hovertemplate: `Sink rate, ${stepOf()}, %{x}, ${name}: %{y:.1%}<extra></extra>`,
    };
  });
  Plotly.react("card", bars, layout({
    barmode: "group", xaxis: axis({ showgrid: false, tickangle: 0, ...(narrow() ? { tickfont: { size: 9, color: colour("muted") } } : {}) }), yaxis: axis({ title: fields.sink_rate.title, tickformat: ".0%", range: [0, 1.12] }),
  }), config);
};

const drawComponents = () => {
  const body = $("components").tBodies[0];
  body.replaceChildren();
  const parts = shownRecord().top_components;
  const gated = parts.some(([, , , , gate]) => gate !== null);
  $("components").tHead.replaceChildren();
  row(["part", "share", ...(gated ? ["gate"] : [])], $("components").tHead, "th");
  for (const [kind, block, index, share, gate] of parts) row([index === null ? label([kind, block]) : `${words(kind)} ${index} of block ${block}`, percent(share), ...(gated ? [gate === null ? "" : fixed(gate)] : [])], body);
};

const MEANING = {
  necessity: "replaced at P0 by what stands at another position", sufficiency: "put on another position",
  other_position_alone: "another position attends to itself alone",
  other_position_alone_in_first_two: "another position attends to itself alone in blocks 0 and 1",
  other_position_alone_since_last_sink: "another position attends to itself alone from the end of the sink before on",
  other_position_alone_since_last_sink_began: "another position attends to itself alone from the beginning of the sink before on",
  p0_mixed: "P0 attends to all positions",
};
/** Of the attention to P0: what goes when a sublayer's write is replaced there; null where it was not tested. */
const necessity = ([kind, block]) => (shownRecord().causal ?? []).find(
  ([test, ofKind, ofBlock, index]) => test === "necessity" && ofKind === kind && ofBlock === block && index === null,
) ?? null;

const drawCausal = () => {
  const tests = shownRecord().causal;
  $("causal").hidden = !tests;
  const body = $("tests").tBodies[0];
  body.replaceChildren();
  for (const [test, kind, , , , effect, low, high, name, verdict] of tests ?? []) {
    const lost = test === "necessity" || kind === "p0_mixed";
    const what = test === "position" ? "" : sentence(name);
    const change = [effect, low, high].map((value) => percent(lost ? -value : value));
    row([what, MEANING[test === "position" ? kind : test], change[0], `${change[lost ? 2 : 1]} to ${change[lost ? 1 : 2]}`, verdict ?? ""], body);
  }
};

const svg = (tag, attributes, parent, text) => {
  const made = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", tag));
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

/** The circuit: sinks in series, who writes and erases each, and the two halves of it below.

Columns run from the embedding through all blocks; bars are shares, squares attention to P0. */
const drawCircuit = () => {
  const record = shownRecord();
  const { blocks } = shown().model;
  const left = 92;
  const room = Math.min(1200, $("circuit").clientWidth || 1200) - left - 24;
  const step = Math.max(18, Math.min(150, room / (blocks + 1)));
  const middle = 164;
  const tallest = 74;
  const mixing = blockwise(record, "mixing");
  const ratios = ["attention_write_ratio", "mlp_write_ratio"].map((name) => [name, blockwise(record, name)]).filter(([, values]) => values);
  const halves = (mixing ? 34 : 0) + (ratios.length ? 74 : 0);
  const floor = middle + 122 + halves;
  const height = floor + 40;
  const width = left + step * (blocks + 1) + 24;
  const scale = tallest / largest(record.shares.map((part) => Math.abs(part[2])), 1e-9);
  const verdicts = record.shares.map((part) => [part, necessity(part)]).filter(([, test]) => test && test[9]);
  const found = verdicts.map(([part, test]) => `${label(part)} is ${test[9]}`).join(", ");
  const said = record.shares.filter((part) => Math.abs(part[2]) >= 0.05).map((part) => `${label(part)} ${percent(part[2])}`).join(", ");
  const unformed = !record.formed && !record.untold;
  $("circuit").classList.toggle("unformed", unformed);
  $("unformed").hidden = !unformed || !record.shares.length;
  $("circuit").replaceChildren();
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
    "aria-label": `${record.says[0]} ${said ? `Written by: ${said}.` : ""}${found && ` ${found}.`}`,
  }, $("circuit"));
  const centre = (block) => left + step * (block + 1.5);
  const text = (x, y, words_, className = "small", anchor = "middle") => svg("text", { x, y, "text-anchor": anchor, class: className }, picture, words_);
  /** Text that stays inside of the picture. */
  const inside = (x, y, words_, className) => {
    const half = 3.4 * words_.length;
    return text(Math.max(left + half, Math.min(width - 6 - half, x)), y, words_, className);
  };
  const side = (y, ...lines) => lines.forEach((line, i) => text(left - 12, y + 13 * i, line, "side", "end"));
  side(middle - 52, "attention", "writes");
  side(middle + 4, "attention", "to P0");
  side(middle + 58, "MLP", "writes");
  svg("line", { x1: left, x2: width - 12, y1: middle, y2: middle, stroke: colour("line"), "stroke-width": 3 }, picture);

  record.sinks.forEach((sink, i) => {
    const [x0, x1] = [centre(sink.first) - step / 2, centre(sink.last) + step / 2];
    svg("rect", { x: x0, width: x1 - x0, y: 20, height: floor - 20, class: `phase ${i ? "" : "main"}` }, picture);
    const span = sink.first === sink.last ? `block ${sink.first}` : `blocks ${sink.first} to ${sink.last}`;
    inside((x0 + x1) / 2, 15, `${i || record.sinks.length === 1 ? "sink" : "main sink"}: ${span}`, "phase-name");
    const writer = sink.writers[0];
    if (writer && step >= 64) inside((x0 + x1) / 2, 52, `written by ${writer[0]} (${percent(writer[3])})`, "writer");
    else if (writer) {
      const [name, kind, block, share] = writer;
      const x = block === null ? left + step / 2 : centre(block);
      inside(x, kind === "mlp" || block === null ? middle + 102 + 13 * (i % 2) : 58, `${sentence(name)} writes ${percent(share)}`, "writer");
    }
    if (sink.erasers.length) {
      const at = sink.erasers.map(([, , block]) => centre(block));
      for (const [name, kind, block, share] of sink.erasers) {
        const y = kind === "mlp" ? middle + 20 : middle - 20;
        const cross = svg("path", { d: `M${centre(block) - 5},${y - 5}l10,10m0,-10l-10,10`, class: "eraser" }, picture);
        svg("title", {}, cross, `${name} erases: its write at P0 is ${percent(share)} of the state at the peak`);
      }
      const names = sink.erasers.map(([name]) => name);
      inside(at.reduce((a, b) => a + b) / at.length, 36, `${names.join(", ")} erase${names.length > 1 ? "" : "s"}`, "erased");
    }
  });

  const column = (x, share, up, name, tone, tested) => {
    const length = Math.abs(share) * scale;
    const negative = share < 0;
    const box = svg("rect", {
      x: x - 0.3 * step, width: 0.6 * step, y: up ? middle - 14 - length : middle + 14, height: Math.max(length, 0.5), rx: 2, class: "part",
      fill: negative ? "none" : tone, stroke: tone, "stroke-dasharray": negative ? "3 2" : "none",
    }, picture);
    const test = tested && necessity(tested);
    const without = test ? `; without it attention to P0 falls by ${percent(test[5])}${test[9] ? `: ${test[9]}` : ""}` : "";
    svg("title", {}, box, `${sentence(name)}: ${percent(share)} of the P0 state, ${stepOf()}${without}`);
    if (test && test[9]) {
      box.setAttribute("stroke", colour("mark"));
      box.setAttribute("stroke-width", 2.5);
      text(x, up ? middle - 33 - length : middle + 41 + length, step >= 90 ? test[9] : test[9][0].toUpperCase(), "verdict");
    }
    if (step >= 64 && Math.abs(share) >= 0.005) {
      const writes = record.sinks.some(({ writers: [first] }) => first && tested && first[1] === tested[0] && first[2] === tested[1]);
      text(x, up ? middle - 19 - length : middle + 27 + length, `${name.split(" ")[0]} ${percent(share)}`, writes ? "small writer" : "small");
    }
  };
  for (const part of record.shares) {
    const [kind, block, share] = part;
    if (block === null) column(left + step / 2, share, false, kind, colour("muted"));
    else column(centre(block), share, kind !== "mlp", label(part), depthColour(block, blocks), part);
  }
  const cell = Math.min(9, 0.42 * step);
  for (const block of range(blocks)) {
    const value = record.concentration[block];
    const square = svg("rect", {
      x: centre(block) - cell, y: middle - cell, width: 2 * cell, height: 2 * cell, rx: 3, class: "block", "stroke-width": value >= epsilon ? 2.5 : 1,
      fill: value === null ? colour("gap") : mixed(heats(), value), stroke: value >= epsilon ? colour("accent") : colour("muted"),
    }, picture);
    svg("title", {}, square, `Block ${block}, ${stepOf()}: ${value === null ? "not measured, or no softmax attention" : `${fields.concentration.title} ${formatted(value, fields.concentration.form)}`}`);
    if (blocks <= 24 || block % 4 === 0) text(centre(block), floor + 16, block);
  }
  text(left + step / 2, floor + 16, step >= 60 ? "embedding" : "emb.");
  text(left + (step * (blocks + 1)) / 2, floor + 33, "block");
  let y = middle + 128;
  if (mixing) {
    side(y + 10, "identified:", "unmixed");
    for (const block of range(blocks)) {
      const value = mixing[block] ?? null;
      const square = svg("rect", { x: centre(block) - 0.42 * step, y, width: 0.84 * step, height: 14, class: "half", fill: value === null ? colour("gap") : mixed(heats(), value) }, picture);
      svg("title", {}, square, `Block ${block}, ${stepOf()}: ${fields.mixing.title} ${value === null ? "not measured" : formatted(value, fields.mixing.form)}; P0 has 1`);
    }
    y += 34;
  }
  if (ratios.length) {
    const logs = ratios.flatMap(([, values]) => values).filter((value) => value > 0).map(Math.log10);
    const [low, high] = [Math.min(0, ...logs), Math.max(1, ...logs)];
    ratios.forEach(([name, values], i) => values.forEach((value, block) => {
      if (!(value > 0)) return;
      const length = (52 * (Math.log10(value) - low)) / (high - low);
      const box = svg("rect", {
        x: centre(block) - 0.4 * step + 0.42 * step * i, width: 0.36 * step, y: y + 56 - length, height: Math.max(1, length), class: "half",
        fill: i ? depthColour(block, blocks) : "none", stroke: depthColour(block, blocks),
      }, picture);
      svg("title", {}, box, `Block ${block}, ${stepOf()}: ${fields[name].title} ${formatted(value, fields[name].form)}`);
    }));
    side(y + 6, "amplified:", "write at P0", "over others,", `log, to ${formatted(10 ** high, ".2g")}×`);
  }
};

/** The circuit as a file of its own, with the style that the page gives it. */
const circuitFile = () => {
  const copy = $("circuit").firstChild.cloneNode(true);
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]).filter((rule) => rule.selectorText?.startsWith("#circuit "));
  const style = svg("style", {}, copy, `text { font-family: sans-serif; } ${rules.map((rule) => rule.cssText.replaceAll("#circuit ", "").replace(/var\(--([\w-]+)\)/g, (_, name) => colour(name))).join(" ")}`);
  copy.prepend(style);
  return new XMLSerializer().serializeToString(copy);
};

/** What no record of the run holds is not drawn, and named below. */
const hideUnmeasured = () => {
  const { records } = shown();
  const held = {
    circuit: (record) => record.shares.length || some(record.concentration), heads: (record) => some(record.concentration) || Object.keys(record.by_head ?? {}).length,
    shares: (record) => record.shares.length, first_tokens: (record) => record.first_tokens[1].length, components: (record) => record.top_components.length,
  };
  const titles = [];
  for (const [id, of] of Object.entries(held)) {
    const figure = $(id).closest("figure");
    figure.hidden = !records.some(of);
    if (figure.hidden) titles.push(figure.querySelector("h2")?.textContent ?? "largest parts");
  }
  $("undrawn").hidden = !titles.length;
  $("undrawn").textContent = `Not in these records, so not drawn: ${titles.map((title) => title[0].toLowerCase() + title.slice(1)).join("; ")}.`;
};
const drawRecord = () => {
  const slider = $("record");
  const record = shownRecord();
  slider.max = shown().records.length - 1;
  slider.value = state.record[state.run];
  $("chosen").textContent = `step ${count(record.step)}`;
  slider.setAttribute("aria-valuetext", $("chosen").textContent);
  const [finding, ...more] = record.says;
  $("reference").firstElementChild.textContent = finding;
  $("reference").lastElementChild.replaceChildren();
  for (const line of more) element("li", line, $("reference").lastElementChild);
  hideUnmeasured();
  drawCircuit();
  drawShares();
  drawHeads();
  drawFirstTokens();
  drawCard();
  drawComponents();
  drawCausal();
};

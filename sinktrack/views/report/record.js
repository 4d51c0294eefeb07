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

const drawHeads = () => {
  const { blocks } = shown().model;
  const z = unpacked(shownRecord(), blocks);
  const few = (number) => (number > 16 ? {} : { dtick: 1 });
  Plotly.react("heads", [{
    type: "heatmap", x: range(z[0].length), y: range(blocks), z, zmin: 0, zmax: 1, hoverongaps: false, colorscale: scaleOf(heats()),
    colorbar: bar("attention to P0"), hovertemplate: "block %{y}, head %{x}: %{z:.4f}<extra></extra>", xgap: 1, ygap: 1,
  }], layout({
    plot_bgcolor: colour("gap"), xaxis: axis({ title: "head", showgrid: false, zeroline: false, ...few(z[0].length) }),
    yaxis: axis({ title: "block", showgrid: false, zeroline: false, autorange: "reversed", ...few(blocks) }),
  }), config);
};

const label = ([kind, block]) => (block === null ? "" : `block ${block} `) + words(kind);
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
  const room = 0.12 * (high - low);
  const slots = Math.max(parts.length, 4);
  Plotly.react("shares", [{
    type: "bar", orientation: "h", x: shares, y: parts.map(label), text: shares.map(percent), textposition: "outside", cliponaxis: false,
    textfont: { color: colour("muted") }, hovertemplate: "%{y}: %{x:.2%}<extra></extra>",
    marker: { color: parts.map(([, block]) => (block === null ? colour("muted") : depthColour(block, blocks))) },
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
    hovertemplate: `block %{x}: %{y:.3g}<extra>${name}</extra>`,
  });
  Plotly.react("first_tokens", [
    {
      x: [...blocks, ...blocks.toReversed()], y: [...at(high), ...at(low).toReversed()], fill: "toself", fillcolor: tone,
      mode: "lines", line: { color: tone, width: 1 }, opacity: 0.2, hoverinfo: "skip", showlegend: false,
    },
    line("distinct first tokens", middle, tone), line("the probe", record.norm_ratio, colour("muted")),
  ], layout({
    xaxis: axis({ title: "block", ...(blocks.length > 16 ? {} : { dtick: 1 }) }),
    yaxis: axis({ title: "norm ratio", type: "log" }),
  }), config);
};

const drawComponents = () => {
  const body = $("components").tBodies[0];
  body.replaceChildren();
  for (const [kind, block, index, share, gate] of shownRecord().top_components) {
    row([words(kind), block ?? "", index ?? "", percent(share), gate === null ? "" : fixed(gate)], body);
  }
};

const MEANING = {
  necessity: "replaced at P0 by what stands at another position", sufficiency: "put on another position",
  other_position_alone: "another position attends to itself alone",
  other_position_alone_in_first_two: "another position attends to itself alone in blocks 0 and 1",
  other_position_alone_since_last_sink: "another position attends to itself alone from the end of the sink before on",
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
  for (const [test, kind, block, index, , effect, low, high, verdict] of tests ?? []) {
    const lost = test === "necessity" || kind === "p0_mixed";
    const what = test === "position" ? "" : `${label([kind, block])} ${index ?? ""}`.trim();
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

/** Columns from the embedding through all blocks; bars are shares, squares attention to P0. */
const drawCircuit = () => {
  const record = shownRecord();
  const { blocks } = shown().model;
  const step = Math.max(22, Math.min(150, 1200 / (blocks + 1)));
  const [tallest, middle, height] = [70, 122, 260];
  const width = step * (blocks + 1) + 24;
  const scale = tallest / largest(record.shares.map((part) => Math.abs(part[2])), 1e-9);
  const verdicts = record.shares.map((part) => [part, necessity(part)]).filter(([, test]) => test && test[8]);
  const found = verdicts.map(([part, test]) => `${label(part)} is ${test[8]}`).join(", ");
  const said = record.shares.filter((part) => Math.abs(part[2]) >= 0.05).map((part) => `${label(part)} ${percent(part[2])}`).join(", ");
  const sinks = range(blocks).filter((block) => record.concentration[block] >= epsilon);
  $("circuit").replaceChildren();
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
    "aria-label": `Written by: ${said}. ${sinks.length ? `Sinks in blocks ${sinks.join(", ")}.` : "No block has a sink."}${found && ` ${found}.`}`,
  }, $("circuit"));
  const centre = (block) => 12 + step * (block + 1.5);
  svg("line", { x1: 12, x2: width - 12, y1: middle, y2: middle, stroke: colour("line"), "stroke-width": 3 }, picture);
  const column = (x, share, up, name, tone, tested) => {
    const length = Math.abs(share) * scale;
    const negative = share < 0;
    const box = svg("rect", {
      x: x - 0.3 * step, width: 0.6 * step, y: up ? middle - 14 - length : middle + 14, height: Math.max(length, 0.5), rx: 2,
      fill: negative ? "none" : tone, stroke: tone, "stroke-dasharray": negative ? "3 2" : "none",
    }, picture);
    const test = tested && necessity(tested);
    const without = test ? `; without it attention to P0 falls by ${percent(test[5])}${test[8] ? `: ${test[8]}` : ""}` : "";
    svg("title", {}, box, `${name}: ${percent(share)}${without}`);
    if (test && test[8]) {
      box.setAttribute("stroke", colour("mark"));
      box.setAttribute("stroke-width", 2.5);
      svg("text", { x, y: up ? middle - 33 - length : middle + 41 + length, "text-anchor": "middle", class: "verdict" }, picture, step >= 90 ? test[8] : test[8][0].toUpperCase());
    }
    if (step >= 40 && Math.abs(share) >= 0.005) {
      svg("text", { x, y: up ? middle - 19 - length : middle + 27 + length, "text-anchor": "middle", class: "small" }, picture, `${name.split(" ").at(-1)} ${percent(share)}`);
    }
  };
  for (const part of record.shares) {
    const [kind, block, share] = part;
    if (block === null) column(12 + step / 2, share, false, kind, colour("muted"));
    else column(centre(block), share, kind !== "mlp", label(part), depthColour(block, blocks), part);
  }
  for (const block of range(blocks)) {
    const value = record.concentration[block];
    const square = svg("rect", {
      x: centre(block) - 9, y: middle - 9, width: 18, height: 18, rx: 3, "stroke-width": value >= epsilon ? 2.5 : 1,
      fill: value === null ? colour("gap") : mixed(heats(), value), stroke: value >= epsilon ? colour("accent") : colour("muted"),
    }, picture);
    svg("title", {}, square, `block ${block}: ${value === null ? "not measured, or no softmax attention" : `attention to P0 ${fixed(value)}`}`);
    if (blocks <= 24 || block % 4 === 0) svg("text", { x: centre(block), y: height - 6, "text-anchor": "middle", class: "small" }, picture, block);
  }
  if (record.reference_block === null) return;
  const edge = centre(record.reference_block) - step / 2;
  svg("line", { x1: edge, x2: edge, y1: 18, y2: height - 22, stroke: colour("mark"), "stroke-dasharray": "2 3" }, picture);
  svg("text", { x: Math.min(edge + 5, width - 170), y: 16, class: "small" }, picture, record.formed ? "the sink starts here" : "judged here; no sink has formed");
};

const drawRecord = () => {
  const slider = $("record");
  const record = shownRecord();
  const block = record.reference_block;
  slider.max = shown().records.length - 1;
  slider.value = state.record[state.run];
  $("chosen").textContent = `step ${count(record.step)}`;
  slider.setAttribute("aria-valuetext", $("chosen").textContent);
  $("reference").textContent = block === null
    ? `No sink in the first ${plural(shown().measured_blocks, "block")}; the others were not measured, so nothing is said of who writes the P0 state.`
    : !record.formed
    ? `No block's concentration reaches ${epsilon} here; judged at block ${block}, where the norm of P0 stands out most.`
    : block === 0
      ? "The sink stands in block 0: it precedes any write, so the embedding is all there is."
      : `Judged at block ${block}, the first with a sink.` + (block > 2 ? "" : " All block shares lie in the first two blocks by construction.");
  drawCircuit();
  drawHeads();
  drawShares();
  drawFirstTokens();
  drawComponents();
  drawCausal();
};

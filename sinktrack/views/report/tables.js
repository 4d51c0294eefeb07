// Words and tables: facts, headline numbers, runs, records, and their export.

const describe = () => {
  const run = shown();
  const { model, records } = run;
  const last = records.at(-1);
  const facts = {
    ...(runs.length > 1 ? { run: run.name } : {}),
    model: model.type,
    size: [plural(model.blocks, "block"), plural(model.heads, "head"), model.experts && plural(model.experts, "expert")]
      .filter(Boolean).join(", "),
    steps: records.length > 1 ? `${count(records[0].step)} to ${count(last.step)}` : count(last.step),
    records: records.length < run.total ? `${count(run.total)}, of which ${count(records.length)} are drawn` : count(records.length),
    probe: run.probe.slice(0, 12),
  };
  $("facts").replaceChildren();
  for (const [name, value] of Object.entries(facts)) {
    const pair = element("div", "", $("facts"));
    element("dt", name, pair);
    element("dd", value, pair);
  }
  $("cards").replaceChildren();
  const card = (name, value, note) => {
    const box = element("div", "", $("cards"), "card");
    element("p", name, box);
    element("p", value, box, "value");
    element("p", note, box);
  };
  const measured = (name, field, none) =>
    card(name, percent(last[field]), last[field] === null ? none : between(last.intervals[field], percent));
  const reference = last.reference_block;
  const partly = run.measured_blocks && `measured in ${plural(run.measured_blocks, "block")} of ${model.blocks} only`;
  measured("Sink rate", "sink_rate", partly || "no block has softmax attention");
  card("Reference block", last.formed ? `block ${reference}` : "none",
    last.formed ? "the first with a sink" : reference === null ? partly : "no block has formed a sink");
  if (last.formed || reference === null) measured("First-two share", "first_two_share", reference === null ? partly : "the sink precedes any write");
  else card("First-two share", "–", "no sink whose state it could be of");
  measured("First-two gain", "first_two_gain", partly || "P0's norm has not doubled");

  const ever = records.some((record) => record.formed);
  const most = largest(last.concentration, 0);
  const judged = reference === null ? `Only the first ${plural(run.measured_blocks, "block")} were measured.`
    : `Shares are taken at block ${reference}, where the norm of P0 stands out most.`;
  const [finding, note] = !ever
    ? [`No sink has formed in this run: no block's concentration reaches ${epsilon} (largest now: ${fixed(most)}).`, judged]
    : !last.formed
      ? [`In the last record no block's concentration reaches ${epsilon} any more (largest: ${fixed(most)}).`, judged]
      : reference === 0
        ? ["The sink stands in block 0: it precedes any write.", "So no block has a share in it."]
        : [`The sink starts in block ${reference}.`, reference > 2 ? "" :
          "All writes before it lie in the first two blocks by construction: read the first-two share beside the reference block."];
  $("verdict").replaceChildren();
  element("b", finding, $("verdict"));
  $("verdict").append(" ", note);
  $("signal").replaceChildren();
  for (const line of run.signal) element("li", line, $("signal"));
  $("probes").hidden = new Set(runs.map((one) => one.probe)).size === 1;
  $("missing").textContent = run.missing.length ? `Not claimed yet: ${run.missing.join("; ")}.` : "";
  $("same_weights").textContent = run.same_weights.map((line) => `${line[0].toUpperCase()}${line.slice(1)}.`).join(" ");
  $("same_weights").hidden = !run.same_weights.length;
  $("verdict").parentElement.classList.toggle("warn", !last.formed);
  $("versions").textContent = Object.entries(run.versions).map((pair) => pair.join(" ")).join(", ") + ".";
  for (const place of document.querySelectorAll(".epsilon")) place.textContent = epsilon;
  for (const place of document.querySelectorAll(".of")) place.textContent = runs.length > 1 ? ` · ${run.name}` : "";
};

const COLUMNS = {
  step: (record) => count(record.step),
  tokens: (record) => count(record.tokens),
  loss: (record) => (record.loss === null ? "–" : record.loss.toPrecision(4)),
  stage: (record) => record.stage ?? "–",
  "sink rate": (record) => percent(record.sink_rate),
  "95 %": (record) => (record.intervals.sink_rate ? record.intervals.sink_rate.map(percent).join(" to ") : "–"),
  "reference block": (record) => (record.formed ? record.reference_block : "no sink"),
  "first-two share": (record) => percent(record.formed ? record.first_two_share : null),
  "first-two gain": (record) => percent(record.first_two_gain),
  depth: (record) => fixed(record.formed ? record.depth : null),
  source: (record) => record.source,
};
/** The columns that hold something. */
const columns = (records) => Object.entries(COLUMNS).filter(([name]) => !(name in records[0]) || records.some((record) => record[name] !== null));

/** The runs below each other, each with a radio button that shows it in detail. */
const compare = () => {
  $("compared").hidden = runs.length === 1;
  if (runs.length === 1) return;
  const table = $("compared").querySelector("table");
  const used = columns(runs.flatMap((run) => run.records));
  table.tHead.replaceChildren();
  row(["run", ...used.map(([name]) => name)], table.tHead, "th");
  table.tBodies[0].replaceChildren();
  runs.forEach((run, i) => {
    const made = row(["", ...used.map(([, text]) => text(run.records.at(-1)))], table.tBodies[0]);
    const choose = element("label", "", made.cells[0]);
    const radio = element("input", "", choose);
    Object.assign(radio, { type: "radio", name: "run", value: i, checked: i === state.run });
    element("i", "", choose, "swatch").style.background = runColour(i);
    choose.append(run.name);
  });
};

/** Built when it is opened: a thousand rows take time. */
const listRecords = () => {
  if (!$("records").open) return;
  const table = $("records").querySelector("table");
  const used = columns(shown().records);
  table.tHead.replaceChildren();
  row(used.map(([name]) => name), table.tHead, "th");
  const body = document.createElement("tbody");
  shown().records.forEach((record, i) => {
    const made = row(used.map(([, text]) => text(record)), body);
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: made.cells[0].textContent });
    button.dataset.record = i;
    made.cells[0].replaceChildren(button);
  });
  table.tBodies[0].replaceWith(body);
};

const save = (text, type, name) => {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
};
const quoted = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
/** One row a record: headline numbers, their intervals, and a column per block where it applies. */
const asCsv = () => {
  const scalars = ["step", "tokens", "loss", "source", "stage", "sink_rate", "formed", "reference_block", "first_two_share", "first_two_gain", "depth", "peak_block", "seconds"];
  const bounds = Object.keys(shown().records[0].intervals);
  const widths = Object.keys(MEASURES).map((name) => [name, Math.max(...runs.map((run) => run.records[0][name].length))]);
  const head = ["run", ...scalars, ...bounds.flatMap((name) => [`${name}_low`, `${name}_high`]),
    ...widths.flatMap(([name, width]) => range(width).map((block) => `${name}_${String(block).padStart(2, "0")}`))];
  const rows = runs.flatMap((run) => run.records.map((record) => [
    run.name, ...scalars.map((name) => record[name]), ...bounds.flatMap((name) => record.intervals[name] ?? [null, null]),
    ...widths.flatMap(([name, width]) => range(width).map((block) => record[name][block])),
  ]));
  return [head, ...rows].map((cells) => cells.map((cell) => quoted(cell ?? "")).join(",")).join("\n") + "\n";
};
const asJson = () => JSON.stringify(runs.map((run) => ({
  ...run,
  records: run.records.map(({ heads, ...record }) => ({ ...record, p0_attention: unpacked({ heads }, run.model.blocks) })),
})));
const saveData = (form) => (form === "csv" ? save(asCsv(), "text/csv", "sinktrack.csv") : save(asJson(), "application/json", "sinktrack.json"));

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
    probe: run.probe?.slice(0, 12) ?? "–",
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
  const measured = (field, none) => {
    const write = (value) => formatted(value, fields[field].form);
    card(sentence(fields[field].title), write(last[field]), last[field] === null ? none : last.intervals[field] === undefined ? "" : between(last.intervals[field], write));
  };
  const partly = run.measured_blocks && `measured in ${plural(run.measured_blocks, "block")} of ${model.blocks} only`;
  const why = (field, otherwise) => last.missing[field] ?? otherwise;
  const attends = run.block_kinds.some((kind) => kind !== "linear" && kind !== "mlp");
  if (rate === "head_share") card(sentence(fields[rate].title), formatted(last[rate], fields[rate].form), "in the place of a sink rate");
  else measured("sink_rate", partly || why("sink_rate", attends ? "this record holds none" : "no block has softmax attention"));
  const [main, ...others] = last.sinks;
  const span = ({ first, last: end }) => (first === end ? first : `${first} to ${end}`);
  card(others.length ? "Main sink in blocks" : "Sink in blocks", main ? span(main) : last.untold ? "–" : "none",
    others.length ? `weaker: ${others.map(span).join(", ")}` : main ? "they rest on P0" : last.untold ? `not measured: ${last.untold}` : partly || "no block has formed a sink");
  const writer = main?.writers[0];
  if (writer) card("Main writer", sentence(writer[0]), `${percent(writer[3])} of ${others.length ? "the main sink's" : "the sink's"} state`);
  if (last.position_share !== null) measured("position_share", "");
  if (last.formed) {
    for (const field of ["first_two_share", "depth"]) measured(field, partly || why(field, why("shares", "the sink precedes any write")));
  } else card(sentence(fields.first_two_share.title), "–", last.untold ? "not measured" : "no sink whose state it could be of");

  const [finding, ...more] = run.story;
  $("verdict").replaceChildren();
  element("b", finding, $("verdict"));
  $("story").replaceChildren();
  $("asides").replaceChildren();
  $("more").hidden = !run.asides.length;
  for (const line of more) element("li", line, $(run.asides.includes(line) ? "asides" : "story"));
  $("signal").replaceChildren();
  for (const line of run.signal) element("li", line, $("signal"));
  $("onsets").hidden = !run.onsets.length;
  const [methods, ...rows] = run.onsets.length ? run.onsets : [[]];
  const onsets = $("onsets").querySelector("table");
  onsets.tHead.replaceChildren();
  onsets.tBodies[0].replaceChildren();
  row(methods, onsets.tHead, "th");
  for (const [name, ...steps] of rows) row([name, ...steps.map((step) => (step === null ? "–" : count(Math.round(step))))], onsets.tBodies[0]);
  $("probes").hidden = new Set(runs.map((one) => one.probe)).size === 1;
  $("missing").textContent = run.missing.length ? `Not claimed yet: ${run.missing.join("; ")}.` : "";
  $("statistics").hidden = !run.signal.length && !run.missing.length;
  $("same_weights").textContent = run.same_weights.map((line) => `${line[0].toUpperCase()}${line.slice(1)}.`).join(" ");
  $("same_weights").hidden = !run.same_weights.length;
  $("verdict").parentElement.classList.toggle("warn", !last.formed && !last.untold);
  $("versions").textContent = Object.entries(run.versions).map((pair) => pair.join(" ")).join(", ") + ".";
  for (const place of document.querySelectorAll("[data-field-help]")) place.textContent = fields[place.dataset.fieldHelp].help;
  for (const place of document.querySelectorAll("[data-field]")) place.textContent = sentence(fields[place.dataset.field].title);
  for (const place of document.querySelectorAll(".of")) place.textContent = runs.length > 1 ? ` · ${run.name}` : "";
};

const COLUMNS = {
  step: (record) => count(record.step),
  tokens: (record) => count(record.tokens),
  loss: (record) => (record.loss === null ? "–" : record.loss.toPrecision(4)),
  stage: (record) => record.stage ?? "–",
  ...Object.fromEntries([
    ["sink_rate", () => true], ...(rate === "sink_rate" ? [] : [[rate, () => true], ["first_sink_block", () => true]]), ["reference_block", (record) => record.formed], ["first_two_share", (record) => record.formed],
    ["first_two_gain", () => true], ["depth", (record) => record.formed], ["position_share", () => true],
  ].flatMap(([name, of]) => [
    [fields[name].title, (record) => (of(record) ? told(record, name) : "–")],
    ...(name === "sink_rate" ? [["95 %", (record) => (record.intervals[name] ? between(record.intervals[name], (bound) => formatted(bound, fields[name].form)).replace("95 %: ", "") : "–")]] : []),
  ])),
  source: (record) => record.source,
};
/** The columns that hold something. */
const columns = (records) => Object.entries(COLUMNS).filter(([name]) => !(name in records[0]) || records.some((record) => record[name] !== null));

/** When the sink rate left its floor, of the whole run. */
const onsetTold = ({ onset: { step } }) => (step ? `${count(Math.round(step[0]))} (${count(Math.round(step[1]))} to ${count(Math.round(step[2]))})` : "–");
/** The runs below each other, each with a radio button that shows it in detail; above, what they say together. */
const compare = () => {
  $("compared").hidden = runs.length === 1;
  $("verdicts").hidden = runs.length === 1;
  if (runs.length === 1) return;
  const table = $("compared").querySelector("table");
  const lasts = runs.map((run) => run.records.at(-1));
  const same = (name) => ["step", "tokens", "source"].includes(name) && new Set(lasts.map((record) => record[name])).size === 1;
  const used = columns(runs.flatMap((run) => run.records)).filter(([name, text]) => !same(name) && lasts.some((record) => text(record) !== "–"));
  table.tHead.replaceChildren();
  const grouped = compared && settings().length < runs.length;
  row(["run", ...(grouped ? ["setting"] : []), "onset (step)", ...used.map(([name]) => name)], table.tHead, "th");
  table.tBodies[0].replaceChildren();
  $("together").replaceChildren();
  const [verdict, ...found] = compared?.verdict ?? [""];
  $("difference").textContent = verdict ?? "";
  for (const line of found) element("li", line, $("together"));
  if (!compared) {
    for (const { name, story: [finding] } of runs) {
      const line = element("li", "", $("together"));
      element("b", name, line);
      line.append(`: ${finding}`);
    }
  }
  $("all_compared").replaceChildren();
  for (const line of compared?.lines ?? []) element("li", line, $("all_compared"));
  $("comparison").hidden = !compared?.lines.length;
  $("not_compared").textContent = compared?.missing.length ? `Not said: ${compared.missing.join("; ")}.` : "";
  runs.forEach((run, i) => {
    const made = row(["", ...(grouped ? [run.setting] : []), onsetTold(run), ...used.map(([, text]) => text(run.records.at(-1)))], table.tBodies[0]);
    const choose = element("label", "", made.cells[0]);
    const radio = element("input", "", choose);
    Object.assign(radio, { type: "radio", name: "run", value: i, checked: i === state.run });
    element("i", "", choose, "swatch").style.background = runColour(i);
    choose.append(run.name);
  });
};

/** Curves first; of one record, which has none, its circuit; several runs before the one in detail. */
const arrange = () => {
  if (runs.length > 1) $("facts").before($("axis"), $("curves"), $("compared"));
  else $("cards").before($("axis"), $("curves"));
  const alone = runs.length === 1 && runs[0].records.length === 1;
  document.body.classList.toggle("alone", alone); // the story above tells of this record already
  if (alone) $("axis").before($("cards"), $("detail"));
  else $("records").before($("detail"));
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
  const scalars = ["step", "tokens", "loss", "source", "stage", "seconds", "formed", ...numbers()];
  const bounds = Object.keys(shown().records[0].intervals);
  const widths = measures().map((name) => [name, Math.max(...runs.flatMap((run) => run.records.map((record) => blockwise(record, name)?.length ?? 0)))]);
  const head = ["run", ...scalars, ...bounds.flatMap((name) => [`${name}_low`, `${name}_high`]),
    ...widths.flatMap(([name, width]) => range(width).map((block) => `${name}_${String(block).padStart(2, "0")}`))];
  const rows = runs.flatMap((run) => run.records.map((record) => [
    run.name, ...scalars.map((name) => record[name]), ...bounds.flatMap((name) => record.intervals[name] ?? [null, null]),
    ...widths.flatMap(([name, width]) => range(width).map((block) => blockwise(record, name)?.[block])),
  ]));
  return [head, ...rows].map((cells) => cells.map((cell) => quoted(cell ?? "")).join(",")).join("\n") + "\n";
};
const asJson = () => JSON.stringify(runs.map((run) => ({
  ...run,
  records: run.records.map(({ heads, ...record }) => ({ ...record, p0_attention: unpacked({ heads }, run.model.blocks) })),
})));
const saveData = (form) => (form === "csv" ? save(asCsv(), "text/csv", "sinktrack.csv") : save(asJson(), "application/json", "sinktrack.json"));

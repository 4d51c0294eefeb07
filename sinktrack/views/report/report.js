// Puts the page together, and answers the user.

const offer = () => {
  for (const field of ["tokens", "loss"]) {
    const input = document.querySelector(`input[value=${field}]`);
    input.disabled = !runs.every((run) => run.records.some((record) => record[field] !== null));
  }
  document.querySelector("input[value=log]").disabled = !runs.some((run) => run.records.some((record) => record.step > 0));
};
const LISTS = ["measure", "number_field", "of_heads"];
/** Keep in the address what is shown, so that a reload and whoever gets the link see it too. */
const remember = () => {
  const held = { run: shown().name, step: shownRecord().step, x: choice("x"), scale: choice("scale") };
  for (const id of LISTS) if ($(id).value) held[id] = $(id).value;
  history.replaceState(null, "", `#${new URLSearchParams(held)}`);
};
const recall = () => {
  state.run = Math.max(0, runs.findIndex((run) => run.name === wanted.get("run")));
  const record = shown().records.findIndex(({ step }) => String(step) === wanted.get("step"));
  if (record >= 0) state.record[state.run] = record;
  for (const name of ["x", "scale"]) {
    const input = [...document.querySelectorAll(`input[name=${name}]`)].find(({ value }) => value === wanted.get(name));
    if (input && !input.disabled) input.checked = true;
  }
};
const drawAll = () => {
  offer();
  arrange();
  compare();
  describe();
  drawCurves();
  drawRecord();
  listRecords();
};
const showRun = (index) => {
  state.run = index;
  describe();
  if (compared) drawCurves();
  else {
    drawNorms();
    drawLives();
  }
  showRecord(state.record[index]);
  listRecords();
};
const showRecord = (index) => {
  state.record[state.run] = index;
  drawRecord();
  hint();
  remember();
  Plotly.relayout("blocks", { shapes: [mark()] });
};

for (const chart of document.querySelectorAll("figure > .chart, #shares")) {
  const button = element("button", "Save", chart.parentElement.querySelector("figcaption"), "save");
  button.type = "button";
  button.setAttribute("aria-label", `Save ${chart.getAttribute("aria-label")} as SVG`);
  button.addEventListener("click", () => Plotly.downloadImage(chart.id, { format: "svg", filename: `sinktrack_${chart.id}`, width: 900, height: 500 }));
}
const circuitButton = element("button", "Save", $("circuit").parentElement.querySelector("figcaption"), "save");
circuitButton.type = "button";
circuitButton.setAttribute("aria-label", "Save the circuit as SVG");
circuitButton.addEventListener("click", () => save(circuitFile(), "image/svg+xml", "sinktrack_circuit.svg"));
// Says where something is wider than its place, which no scroll bar shows on a phone.
const hints = [...document.querySelectorAll(".scroll")].map((box) => {
  const hint = document.createElement("p");
  Object.assign(hint, { className: "hint", textContent: "Wider than the screen: scroll it sideways.", hidden: true });
  box.before(hint);
  return () => { hint.hidden = box.scrollWidth <= box.clientWidth + 1; };
});
const hint = () => hints.forEach((show) => show());
let width = innerWidth;
/** What is laid out by the width itself; charts follow it by themselves. */
const refit = () => {
  if (innerWidth !== width) {
    width = innerWidth;
    drawCircuit();
    drawBlocks();
  }
  hint();
};
/** Once the charts that they change are there. */
const answer = () => {
  $("axis").addEventListener("change", drawCurves);
  $("measure").addEventListener("change", drawBlocks);
  $("number_field").addEventListener("change", drawNumber);
  $("of_heads").addEventListener("change", drawHeads);
  $("compared").addEventListener("change", (event) => showRun(Number(event.target.value)));
  $("record").addEventListener("input", () => showRecord(Number($("record").value)));
  $("records").addEventListener("toggle", () => {
    listRecords();
    hint();
  });
  $("records").addEventListener("click", ({ target }) => target.dataset.record && showRecord(Number(target.dataset.record)));
  $("export").addEventListener("click", ({ target }) => target.dataset.form && saveData(target.dataset.form));
  $("blocks").on("plotly_click", ({ points: [point] }) => {
    const run = point.data.meta;
    const index = runs[run].records.findIndex((record) => record[choice("x")] === point.x);
    state.record[run] = index;
    if (run === state.run) showRecord(index);
    else {
      document.querySelector(`input[name=run][value="${run}"]`).checked = true;
      showRun(run);
    }
  });
  document.addEventListener("change", remember);
  addEventListener("resize", refit);
  addEventListener("hashchange", () => location.reload());
  dark.addEventListener("change", drawAll);
};

// One chart after the other, so that the page answers while the later ones are drawn.
offer();
recall();
arrange();
compare();
describe();
for (const draw of [drawLeftOut, drawSinkRate, drawLocalization, drawBlocks, drawNorms, drawLives, drawNumber, answer, drawRecord, hint]) setTimeout(draw);

/** Ask the server for new records; stay with the record that is shown, or follow the newest. */
const EVERY = 2000;
const takeIn = (fresh) => {
  const name = shown().name;
  const before = new Map(runs.map((run, i) => [run.name, run.records.length - 1 > state.record[i] ? run.records[state.record[i]].step : Infinity]));
  ({ runs, fields, compared, rate } = fresh);
  state.run = Math.max(0, runs.findIndex((run) => run.name === name));
  state.record = runs.map((run) => {
    const later = run.records.findIndex((record) => record.step >= (before.get(run.name) ?? Infinity));
    return later < 0 ? run.records.length - 1 : later;
  });
  drawAll();
};
const watch = async (version) => {
  try {
    const answer = await fetch("data", { headers: { "If-None-Match": version }, cache: "no-store" });
    if (answer.status === 200) {
      takeIn(await answer.json());
      version = answer.headers.get("ETag");
    }
    $("live").textContent = answer.status === 503 ? await answer.text() : `Live: ${plural(runs.reduce((sum, run) => sum + run.total, 0), "record")} so far.`;
  } catch {
    $("live").textContent = "The server has gone; this is what it sent last.";
  }
  setTimeout(watch, EVERY, version);
};
if (live) {
  $("live").hidden = false;
  watch("");
}

// Puts the page together, and answers the user.

const offer = () => {
  for (const field of ["tokens", "loss"]) {
    const input = document.querySelector(`input[value=${field}]`);
    input.disabled = !runs.every((run) => run.records.some((record) => record[field] !== null));
  }
  document.querySelector("input[value=log]").disabled = !runs.some((run) => run.records.some((record) => record.step > 0));
};
const drawAll = () => {
  offer();
  compare();
  describe();
  drawCurves();
  drawRecord();
  listRecords();
};
const showRun = (index) => {
  state.run = index;
  describe();
  drawNorms();
  showRecord(state.record[index]);
  listRecords();
};
const showRecord = (index) => {
  state.record[state.run] = index;
  drawRecord();
  Plotly.relayout("blocks", { shapes: [mark()] });
};

for (const chart of document.querySelectorAll("figure > .chart, #shares")) {
  const button = element("button", "Save", chart.parentElement.querySelector("figcaption"), "save");
  button.type = "button";
  button.setAttribute("aria-label", `Save ${chart.getAttribute("aria-label")} as SVG`);
  button.addEventListener("click", () => Plotly.downloadImage(chart.id, { format: "svg", filename: `sinktrack_${chart.id}`, width: 900, height: 500 }));
}
$("axis").addEventListener("change", drawCurves);
$("measure").addEventListener("change", drawBlocks);
$("compared").addEventListener("change", (event) => showRun(Number(event.target.value)));
$("record").addEventListener("input", () => showRecord(Number($("record").value)));
$("records").addEventListener("toggle", listRecords);
$("records").addEventListener("click", ({ target }) => target.dataset.record && showRecord(Number(target.dataset.record)));
$("export").addEventListener("click", ({ target }) => target.dataset.form && saveData(target.dataset.form));
dark.addEventListener("change", drawAll);
drawAll();
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

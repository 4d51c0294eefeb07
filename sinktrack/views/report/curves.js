// Charts over training: one colour per run.

const AXES = { step: "optimizer steps", tokens: "tokens", loss: "training loss" };
/** Along the blocks, what a record holds of a field; null where it was left out to save room. */
const blockwise = (record, name) => record[name] ?? record.by_block?.[name] ?? null;
/** Fields along the blocks that differ anywhere: what is the same everywhere is no chart. */
const measures = () => Object.keys(fields).filter((name) => {
  if (!fields[name].by_block) return false;
  const values = new Set(runs.flatMap((run) => run.records.flatMap((record) => blockwise(record, name) ?? [])).filter((value) => value !== null));
  return values.size > 1;
});
/** Single numbers that some record holds. */
const numbers = () => Object.keys(fields).filter((name) => fields[name].number && runs.some((run) => run.records.some((record) => record[name] !== null)));
/** Fill a choice of fields by their titles, and keep what was chosen. */
const offerFields = (id, names, first) => {
  const select = $(id);
  const chosen = [select.value, wanted.get(id)].find((name) => names.includes(name)) ?? (names.includes(first) ? first : names[0]);
  select.replaceChildren();
  const titles = names.map((name) => fields[name].title);
  for (const name of names) {
    const twice = titles.filter((title) => title === fields[name].title).length > 1;
    element("option", sentence(fields[name].title) + (twice ? ` (${words(name)})` : ""), select).value = name;
  }
  if (names.length) select.value = chosen;
};
const choice = (name) => new FormData($("axis")).get(name);

/** The records of a run that have a place on the x axis, and that axis. */
const placed = (run) => {
  const field = choice("x");
  const records = run.records.filter((record) => record[field] !== null && (choice("scale") === "linear" || record[field] > 0));
  return { records, x: records.map((record) => record[field]), mode: records.length > 60 ? "lines" : "lines+markers" };
};
/** Sorted by x, as a heat map wants it. */
const inOrder = ({ records, x }) => {
  const order = range(x.length).sort((a, b) => x[a] - x[b]);
  return { x: order.map((i) => x[i]), records: order.map((i) => records[i]) };
};
const xAxis = (extra = {}) => {
  const places = [...new Set(runs.flatMap((run) => placed(run).x))];
  return axis({
    title: AXES[choice("x")], type: choice("scale"), ...(choice("x") === "loss" ? { autorange: "reversed" } : {}), ...extra,
    ...(places.length === 1 ? { tickvals: places, ticktext: [count(places[0])] } : {}),
  });
};
const at = () => (choice("x") === "loss" ? "loss %{x:.4g}" : "%{x:,}");

const curve = ({ records, x, mode }, name, value, tone, extra = {}) => ({
  x, y: records.map(value), name, type: "scatter", mode, connectgaps: false,
  line: { color: tone, width: 2 }, marker: { color: tone, size: 5 }, ...extra,
});
/** One polygon for each stretch of records that have an interval. */
const band = ({ records, x }, name, tone, extra = {}) => {
  const stretches = [[]];
  records.forEach((record, i) => {
    const interval = record.intervals[name];
    if (interval) stretches.at(-1).push([x[i], ...interval]);
    else stretches.push([]);
  });
  const corners = stretches.filter((points) => points.length).flatMap((points) => [
    ...points.map(([place, low]) => [place, low]), ...points.toReversed().map(([place, , high]) => [place, high]),
    points[0].slice(0, 2), [null, null],
  ]);
  return {
    x: corners.map((corner) => corner[0]), y: corners.map((corner) => corner[1]), type: "scatter", mode: "lines",
    fill: "toself", fillcolor: tone, line: { color: tone, width: records.length === 1 ? 8 : 1 }, opacity: 0.2, hoverinfo: "skip", showlegend: false, ...extra,
  };
};

const drawLeftOut = () => {
  const field = choice("x");
  const values = runs.flatMap((run) => run.records.map((record) => record[field]));
  const unknown = values.filter((value) => value === null).length;
  const zero = choice("scale") === "log" ? values.filter((value) => value === 0).length : 0;
  const what = { step: "step", tokens: "token count", loss: "loss" }[field];
  $("left_out").textContent = [
    unknown && `${plural(unknown, "record")} without a ${what} left out`, zero && `${plural(zero, "record")} at ${field === "tokens" ? "token" : what} 0 left out`,
  ].filter(Boolean).join(", ");
};

const STAGES = ["absent", "emerging", "migrating", "settled", "displaced", "lost"];
const initial = (stage) => stage[0].toUpperCase();
/** A strip of stages for each run; letters tell them apart where colours do not. */
const stageStrips = () => runs.map((run, i) => {
  const { x, records } = inOrder(placed(run));
  return {
    type: "heatmap", x, y: [i], z: [records.map((record) => (record.stage === null ? null : STAGES.indexOf(record.stage)))], text: [records.map(({ stage }, j) => (stage === null || stage === records[j - 1]?.stage ? "" : initial(stage)))], texttemplate: "%{text}",
    customdata: [records.map((record) => record.stage)], textfont: { color: colour("card"), size: 11 },
    yaxis: "y2", zmin: -0.5, zmax: STAGES.length - 0.5, showscale: false, name: "stages", meta: i,
    colorscale: STAGES.flatMap((stage, k) => [[k / STAGES.length, colour(stage)], [(k + 1) / STAGES.length, colour(stage)]]),
    hovertemplate: `${at()}: %{customdata}<extra>${escaped(run.name)}</extra>`,
  };
});
/** When the rate left its floor: a line, and a shade for its interval; of several runs a bar each at the top. */
const onsets = () => runs.flatMap((run, i) => {
  const onset = run.onset[choice("x")];
  if (!onset || (choice("scale") === "log" && onset[1] <= 0)) return [];
  const [value, low, high] = onset;
  const tone = runColour(i);
  return [
    { type: "rect", x0: low, x1: high, ...(runs.length > 1 ? { y0: 0.985 - 0.025 * i, y1: 1 - 0.025 * i, opacity: 0.6 } : { y0: 0, y1: 1, opacity: 0.13 }), yref: "y domain", fillcolor: tone, line: { width: 0 }, layer: "below" },
    { type: "line", x0: value, x1: value, y0: 0, y1: 1, yref: "y domain", line: { color: tone, width: 1, dash: "dot" }, layer: "below" },
  ];
});

/** Where something but the model changed: a line on every curve, named on the first. */
const noted = (of = runs) => of.flatMap((run) => run.marks).map((mark) => ({ ...mark, x: mark[choice("x")] }))
  .filter(({ x }) => x !== null && (choice("scale") === "linear" || x > 0));
const noteLines = (of) => noted(of).map(({ x }) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: colour("muted"), width: 1 }, layer: "below" }));
const noteNames = () => noted().map(({ x, what }) => ({
  x: choice("scale") === "log" ? Math.log10(x) : x, y: 1, yref: "paper", xanchor: "left", yanchor: "top", textangle: 90, showarrow: false, text: escaped(what), font: { color: colour("muted"), size: 11 },
}));

const drawSinkRate = () => {
  const curves = runs.flatMap((run, i) => {
    const on = placed(run);
    const hovertemplate = `${at()}: %{y:.1%}<extra>${escaped(run.name)}</extra>`;
    return [band(on, "sink_rate", runColour(i)), curve(on, escaped(run.name), (record) => record.sink_rate, runColour(i), { hovertemplate })];
  });
  const strip = Math.min(0.4, 0.05 * runs.length);
  Plotly.react("sink_rate", [...curves, ...stageStrips()], layout({
    showlegend: runs.length > 1, shapes: [...onsets(), ...noteLines()], annotations: noteNames(), xaxis: xAxis({ anchor: "y2" }),
    yaxis: axis({ range: [-0.02, 1.02], tickformat: ".0%", domain: [strip + 0.04, 1] }),
    yaxis2: axis({ domain: [0, strip], visible: false, range: [runs.length - 0.5, -0.5] }),
  }), config);
  $("stages").replaceChildren();
  const seen = new Set(runs.flatMap((run) => run.records.map((record) => record.stage)));
  for (const stage of STAGES.filter((stage) => seen.has(stage))) {
    element("i", initial(stage), $("stages"), "swatch").style.background = colour(stage);
    $("stages").append(` ${stage} `);
  }
};

/** Solid while a sink is there, dotted and pale before: what is measured then is of no sink. */
const asFormed = (run, i, field, yaxis, showlegend, steps) => {
  const on = placed(run);
  const tone = runColour(i);
  const line = { color: tone, width: 2, ...(steps ? { shape: "hv" } : {}) };
  const plain = { yaxis, showlegend: false, mode: "lines", hoverinfo: "skip" };
  const value = (record) => record[field];
  const formed = on.records.map((record) => ({ ...record, intervals: record.formed ? record.intervals : {} }));
  return [
    band({ ...on, records: formed }, field, tone, { yaxis }),
    curve(on, "", value, "", { ...plain, line: { ...line, dash: "dot", width: 1.2 }, opacity: 0.45 }),
    curve(on, "", (record) => (record.formed ? value(record) : null), "", { ...plain, line }),
    curve(on, escaped(run.name), value, tone, {
      yaxis, showlegend, mode: "markers", meta: field,
      hovertemplate: on.records.map((record) => `${fields[field].title}, ${at()}: %{y:${d3form(fields[field].form)}}${record.formed ? "" : record.untold ? "" : ", no sink"}<extra>${escaped(run.name)}</extra>`),
      marker: { color: tone, size: on.mode === "lines" ? 0.1 : 5, symbol: on.records.map((record) => (record.formed ? "circle" : "circle-open")) },
    }),
  ];
};

const drawLocalization = () => {
  const panels = [["first_two_share", [0.79, 1]], ["first_two_gain", [0.53, 0.74]], ["depth", [0.27, 0.48]], ["reference_block", [0, 0.21]]];
  const traces = runs.flatMap((run, i) => panels.flatMap(([field], j) =>
    asFormed(run, i, field, j ? `y${j + 1}` : "y", j === 0, fields[field].unit === "block")));
  const axes = Object.fromEntries(panels.map(([field, domain], j) => [`yaxis${j ? j + 1 : ""}`, axis({
    title: fields[field].unit === "block" ? "first block" : fields[field].title.replace("first-two ", ""), domain, rangemode: "tozero", nticks: 4,
    ...(fields[field].form.endsWith("%") ? { tickformat: ".0%" } : fields[field].unit === "block" ? { tickformat: "d" } : {}),
    ...(runs.some((run) => run.records.some((record) => record[field] !== null)) ? {} : { range: [0, 1] }),
  })]));
  Plotly.react("localization", traces, layout({ showlegend: runs.length > 1, shapes: noteLines(), xaxis: xAxis({ anchor: "y4" }), ...axes }), config);
};

/** Any single number over training. */
const drawNumber = () => {
  offerFields("number_field", numbers(), "position_share");
  const name = $("number_field").value;
  if (!name) return;
  const { form, help, scale } = fields[name];
  $("number_help").textContent = help;
  const traces = runs.flatMap((run, i) => {
    const on = placed(run);
    return [band(on, name, runColour(i)), curve(on, escaped(run.name), (record) => record[name], runColour(i), {
      hovertemplate: `${fields[name].title}, ${at()}: %{y:${d3form(form)}}<extra>${escaped(run.name)}</extra>`, meta: name,
    })];
  });
  Plotly.react("number", traces, layout({
    showlegend: runs.length > 1, shapes: noteLines(), xaxis: xAxis(),
    yaxis: axis({ title: titled(name), type: scale, ...(scale === "log" ? {} : { rangemode: "tozero" }), ...(form.endsWith("%") ? { tickformat: ".0%" } : {}) }),
  }), config);
};

/** Block by step, the runs side by side on one scale of colour. */
const narrow = () => $("blocks").clientWidth < 560;
const drawBlocks = () => {
  offerFields("measure", measures(), "concentration");
  const measure = $("measure").value;
  if (!measure) return;
  const { help, form, scale, unit } = fields[measure];
  const logarithmic = scale === "log";
  const scaled = (value) => (logarithmic ? value && Math.log10(value) : value);
  const ons = runs.map((run) => {
    const { x, records } = inOrder(placed(run));
    const held = range(x.length).filter((j) => blockwise(records[j], measure) !== null);
    return { x: held.map((j) => x[j]), rows: held.map((j) => blockwise(records[j], measure)) };
  });
  const values = ons.flatMap(({ rows }) => rows.flat()).filter((value) => value !== null).map(scaled);
  const least = values.reduce((low, value) => Math.min(low, value), 0);
  const probability = ["probability", "share"].includes(unit);
  const high = largest(values, logarithmic || least < 0 ? least + 1e-9 : probability ? epsilon : 0);
  const below = narrow(); // one below the other
  const axes = {};
  const part = 1 / runs.length;
  const domain = (i) => (below ? [1 - (i + 1) * part + (runs.length > 1 ? 0.1 * part : 0), 1 - i * part - (runs.length > 1 ? 0.1 * part : 0)] : [i * part, (i + 1) * part - (i < runs.length - 1 ? 0.035 : 0)]);
  const traces = ons.map(({ x, rows }, i) => {
    const suffix = i ? i + 1 : "";
    const height = largest(rows.map((row) => row.length), runs[i].model.blocks);
    axes[`xaxis${suffix}`] = xAxis({ showgrid: false, anchor: `y${suffix}`, ...(below ? {} : { domain: domain(i) }), ...(below && i < runs.length - 1 ? { title: "" } : {}) });
    axes[`yaxis${suffix}`] = axis({
      title: i && !below ? "" : "block", showgrid: false, zeroline: false, autorange: "reversed", anchor: `x${suffix}`, ...(below ? { domain: domain(i) } : {}), ...(height > 13 ? {} : { dtick: 1 }),
    });
    return {
      type: "heatmap", x, y: range(height), z: range(height).map((block) => rows.map((row) => scaled(row[block] ?? null))),
      customdata: range(height).map((block) => rows.map((row) => row[block] ?? null)),
      xaxis: `x${suffix}`, yaxis: `y${suffix}`, name: escaped(runs[i].name), meta: i, zmin: least, zmax: high, hoverongaps: false, colorscale: scaleOf(heats()),
      showscale: i === runs.length - 1,
      colorbar: { ...bar(titled(measure)), ...(logarithmic ? { tickvals: range(13).map((power) => power - 4), ticktext: range(13).map((power) => String(10 ** (power - 4))) } : form.endsWith("%") ? { tickformat: ".0%" } : {}) },
      hovertemplate: `${escaped(fields[measure].title)}, ${at()}, block %{y}: %{customdata:${d3form(form)}}<extra>${escaped(runs[i].name)}</extra>`,
    };
  });
  const names = runs.length === 1 ? [] : runs.map((run, i) => ({
    text: escaped(run.name), xref: "paper", yref: "paper", x: below ? 0 : i * part, y: below ? domain(i)[1] : 1.01, xanchor: "left", yanchor: "bottom", showarrow: false, font: { color: runColour(i) },
  }));
  const left = runs.reduce((sum, run, i) => sum + placed(run).x.length - ons[i].x.length, 0);
  $("measured").textContent = help + (left ? ` ${plural(left, "record")} without it here.` : "");
  $("blocks").style.height = below && runs.length > 1 ? `${230 * runs.length}px` : "";
  Plotly.react("blocks", traces, layout({
    plot_bgcolor: colour("gap"), margin: { l: 48, r: 12, t: runs.length > 1 ? 30 : 10, b: 40 }, annotations: names, shapes: [mark()], ...axes,
  }), config);
};
/** Where the slider stands, on the heat map of the run in detail. */
const mark = () => {
  const suffix = state.run ? state.run + 1 : "";
  const place = shownRecord()[choice("x")];
  return {
    type: "line", xref: `x${suffix}`, yref: `y${suffix} domain`, x0: place, x1: place, y0: 0, y1: 1,
    visible: place !== null && (choice("scale") === "linear" || place > 0), line: { color: colour("mark"), width: 1.5, dash: "dot" },
  };
};

const drawNorms = () => {
  const { blocks } = shown().model;
  const on = placed(shown());
  const norms = on.records.flatMap((record) => record.norm_ratio).filter((value) => value > 0);
  const spread = largest(norms, 0) / norms.reduce((a, b) => Math.min(a, b), Infinity);
  Plotly.react("norm_ratio", [
    ...range(blocks + 1).map((block) => {
      const name = block < blocks ? `block ${block}` : "output";
      const tone = depthColour(block, blocks);
      return curve(on, name, (record) => record.norm_ratio[block], tone, {
        line: { color: tone, width: blocks > 12 ? 1.2 : 2 }, hovertemplate: `${name}, ${at()}: %{y:.3g}<extra></extra>`,
      });
    }),
    { x: [null], y: [null], type: "scatter", mode: "markers", hoverinfo: "skip",
      marker: { color: [0], cmin: 0, cmax: blocks, colorscale: scaleOf(depths()), showscale: true,
        colorbar: { ...bar("block"), ...(blocks > 12 ? {} : { tickvals: range(blocks + 1), ticktext: [...range(blocks), "output"] }) } } },
  ], layout({
    showlegend: false, shapes: noteLines([shown()]), xaxis: xAxis(), yaxis: axis({ type: "log", tickformat: "~g", ...(spread > 5 ? { dtick: "D2" } : {}) }),
  }), config);
};

const drawCurves = () => {
  drawLeftOut();
  drawSinkRate();
  drawLocalization();
  drawBlocks();
  drawNorms();
  drawNumber();
};

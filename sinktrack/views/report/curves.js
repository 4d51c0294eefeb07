// Charts over training: one colour per run.

const AXES = { step: "optimizer steps", tokens: "tokens", loss: "training loss" };
const MEASURES = {
  concentration: { title: "attention to P0", says: "Mean attention to P0 over the heads of a block.", form: ".3f" },
  sink_rate_by_block: { title: "sink rate", says: "Share of a block's heads and sequences that are sinks.", form: ".1%" },
  norm_ratio: { title: "norm ratio", says: "Norm of the P0 state at a block's input, over the median norm at other positions.", form: ".3g" },
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
/** A strip of stages for each run. */
const stageStrips = () => runs.map((run, i) => {
  const { x, records } = inOrder(placed(run));
  return {
    type: "heatmap", x, y: [i], z: [records.map((record) => (record.stage === null ? null : STAGES.indexOf(record.stage)))], text: [records.map((record) => record.stage)],
    yaxis: "y2", zmin: -0.5, zmax: STAGES.length - 0.5, showscale: false, name: "stages", meta: i,
    colorscale: STAGES.flatMap((stage, k) => [[k / STAGES.length, colour(stage)], [(k + 1) / STAGES.length, colour(stage)]]),
    hovertemplate: `${at()}: %{text}<extra>${escaped(run.name)}</extra>`,
  };
});
/** When the rate left its floor: a line, and a shade for its interval. */
const onsets = () => runs.flatMap((run, i) => {
  const onset = run.onset[choice("x")];
  if (!onset || (choice("scale") === "log" && onset[1] <= 0)) return [];
  const [value, low, high] = onset;
  const tone = runColour(i);
  return [
    { type: "rect", x0: low, x1: high, y0: 0, y1: 1, yref: "y domain", fillcolor: tone, opacity: 0.13, line: { width: 0 }, layer: "below" },
    { type: "line", x0: value, x1: value, y0: 0, y1: 1, yref: "y domain", line: { color: tone, width: 1, dash: "dot" }, layer: "below" },
  ];
});

const drawSinkRate = () => {
  const curves = runs.flatMap((run, i) => {
    const on = placed(run);
    const hovertemplate = `${at()}: %{y:.1%}<extra>${escaped(run.name)}</extra>`;
    return [band(on, "sink_rate", runColour(i)), curve(on, escaped(run.name), (record) => record.sink_rate, runColour(i), { hovertemplate })];
  });
  const strip = Math.min(0.4, 0.05 * runs.length);
  Plotly.react("sink_rate", [...curves, ...stageStrips()], layout({
    showlegend: runs.length > 1, shapes: onsets(), xaxis: xAxis({ anchor: "y2" }),
    yaxis: axis({ range: [-0.02, 1.02], tickformat: ".0%", domain: [strip + 0.04, 1] }),
    yaxis2: axis({ domain: [0, strip], visible: false, range: [runs.length - 0.5, -0.5] }),
  }), config);
  $("stages").replaceChildren();
  const seen = new Set(runs.flatMap((run) => run.records.map((record) => record.stage)));
  for (const stage of STAGES.filter((stage) => seen.has(stage))) {
    element("i", "", $("stages"), "swatch").style.background = colour(stage);
    $("stages").append(`${stage} `);
  }
};

const drawLocalization = () => {
  const rows = [["first_two_share", "y", "%{y:.1%}"], ["first_two_gain", "y2", "%{y:.1%}"], ["depth", "y3", "%{y:.2f}"]];
  const reference = (record) => record.reference_block;
  const traces = runs.flatMap((run, i) => {
    const on = placed(run);
    const tone = runColour(i);
    const steps = { color: tone, width: 2, shape: "hv" };
    const lowest = { yaxis: "y4", showlegend: false, mode: "lines", hoverinfo: "skip" };
    return [
      ...rows.flatMap(([field, yaxis, form], j) => [
        band(on, field, tone, { yaxis }),
        curve(on, escaped(run.name), (record) => record[field], tone, {
          yaxis, showlegend: j === 0, hovertemplate: `${words(field)}, ${at()}: ${form}<extra>${escaped(run.name)}</extra>`, meta: field,
        }),
      ]),
      curve(on, "", reference, "", { ...lowest, line: { ...steps, dash: "dot", width: 1.5 } }),
      curve(on, "", (record) => (record.formed ? reference(record) : null), "", { ...lowest, line: steps }),
      curve(on, escaped(run.name), reference, tone, {
        yaxis: "y4", showlegend: false, mode: "markers", meta: "reference_block",
        hovertemplate: on.records.map((record) => `reference, ${at()}: %{y}${record.formed ? "" : ", no sink"}<extra>${escaped(run.name)}</extra>`),
        marker: { color: tone, size: on.mode === "lines" ? 0.1 : 5, symbol: on.records.map((record) => (record.formed ? "circle" : "circle-open")) },
      }),
    ];
  });
  const panel = (title, domain, extra, field) => axis({
    title, domain, rangemode: "tozero", nticks: 4, ...extra,
    ...(runs.some((run) => run.records.some((record) => record[field] !== null)) ? {} : { range: [0, 1] }),
  });
  Plotly.react("localization", traces, layout({
    showlegend: runs.length > 1, xaxis: xAxis({ anchor: "y4" }),
    yaxis: panel("share", [0.79, 1], { tickformat: ".0%" }, "first_two_share"),
    yaxis2: panel("gain", [0.53, 0.74], { tickformat: ".0%" }, "first_two_gain"),
    yaxis3: panel("depth", [0.27, 0.48], {}, "depth"),
    yaxis4: panel("reference", [0, 0.21], { tickformat: "d" }, "reference_block"),
  }), config);
};

/** Block by step, the runs side by side on one scale of colour. */
const drawBlocks = () => {
  const measure = $("measure").value;
  const { title, says, form } = MEASURES[measure];
  const logarithmic = measure === "norm_ratio";
  const scaled = (value) => (logarithmic ? value && Math.log10(value) : value);
  const ons = runs.map((run) => inOrder(placed(run)));
  const values = ons.flatMap(({ records }) => records.flatMap((record) => record[measure])).filter((value) => value !== null).map(scaled);
  const low = logarithmic ? values.reduce((least, value) => Math.min(least, value), 0) : 0;
  const high = largest(values, logarithmic ? low + 1e-9 : epsilon);
  const axes = {};
  const width = 1 / runs.length;
  const traces = ons.map(({ x, records }, i) => {
    const suffix = i ? i + 1 : "";
    const { blocks } = runs[i].model;
    const rows = logarithmic ? blocks + 1 : blocks;
    axes[`xaxis${suffix}`] = xAxis({ showgrid: false, domain: [i * width, (i + 1) * width - (i < runs.length - 1 ? 0.035 : 0)], anchor: `y${suffix}` });
    axes[`yaxis${suffix}`] = axis({
      title: i ? "" : "block", showgrid: false, zeroline: false, autorange: "reversed", anchor: `x${suffix}`, ...(rows > 13 ? {} : { dtick: 1 }),
    });
    return {
      type: "heatmap", x, y: range(rows), z: range(rows).map((block) => records.map((record) => scaled(record[measure][block]))),
      customdata: range(rows).map((block) => records.map((record) => record[measure][block])),
      xaxis: `x${suffix}`, yaxis: `y${suffix}`, name: escaped(runs[i].name), meta: i, zmin: low, zmax: high, hoverongaps: false, colorscale: scaleOf(heats()),
      showscale: i === runs.length - 1,
      colorbar: { ...bar(title), ...(logarithmic ? { tickvals: range(9).map((power) => power - 2), ticktext: range(9).map((power) => String(10 ** (power - 2))) } : {}) },
      hovertemplate: `${at()}, block %{y}: %{customdata:${form}}<extra>${escaped(runs[i].name)}</extra>`,
    };
  });
  const names = runs.length === 1 ? [] : runs.map((run, i) => ({
    text: escaped(run.name), xref: "paper", yref: "paper", x: i * width, y: 1.01, xanchor: "left", yanchor: "bottom", showarrow: false, font: { color: runColour(i) },
  }));
  $("measured").textContent = says;
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
    showlegend: false, xaxis: xAxis(), yaxis: axis({ type: "log", tickformat: "~g", ...(spread > 5 ? { dtick: "D2" } : {}) }),
  }), config);
};

const drawCurves = () => {
  drawLeftOut();
  drawSinkRate();
  drawLocalization();
  drawBlocks();
  drawNorms();
};

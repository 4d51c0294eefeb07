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
/** Over all runs; of a panel so many pixels wide with as many labels as have room. */
const xAxis = (extra = {}, pixels = narrow() ? 280 : 560) => {
  const places = [...new Set(runs.flatMap((run) => placed(run).x))];
  return axis({
    title: AXES[choice("x")], type: choice("scale"), nticks: Math.max(3, Math.floor(pixels / 80)), ...(choice("x") === "loss" ? { autorange: "reversed" } : {}),
    ...(choice("scale") === "log" ? logTicks(places, Math.max(2, Math.floor(pixels / 50))) : {}), ...extra,
    ...(places.length === 1 ? { tickvals: places, ticktext: [count(places[0])] } : {}),
  });
};
const at = () => ({ step: "step %{x:,}", tokens: "%{x:,} tokens", loss: "loss %{x:.4g}" })[choice("x")];
/** A tooltip: quantity, place, value with its unit, and whose it is. */
const tip = (name, whose, value = "y") => `${sentence(fields[name].title)}, ${at()}: %{${value}:${d3form(fields[name].form)}}${unitOf(name)}<extra>${escaped(whose)}</extra>`;
const narrow = () => document.documentElement.clientWidth < 700;

/** A setting's runs together: least, mean and largest where all have a value, on the lines between their records. */
const overSeeds = (members, name) => {
  if (members.length < 2 || choice("x") === "loss") return null;
  const scaled = choice("scale") === "log" ? Math.log : (value) => value;
  const lines = members.map((i) => inOrder(placed(runs[i]))).map(({ x, records }) => ({ x, y: records.map((record) => record[name]) }));
  const places = [...new Set(lines.flatMap(({ x }) => x))].sort((a, b) => a - b);
  const found = { x: [], low: [], mean: [], high: [] };
  const last = lines.map(() => -1);
  for (const place of places) {
    const values = lines.map(({ x, y }, k) => {
      while (last[k] + 1 < x.length && x[last[k] + 1] <= place) last[k] += 1;
      const j = last[k];
      if (j < 0 || x[j] === place) return y[j] ?? null;
      if (j + 1 === x.length || y[j] === null || y[j + 1] === null) return null;
      return y[j] + ((y[j + 1] - y[j]) * (scaled(place) - scaled(x[j]))) / (scaled(x[j + 1]) - scaled(x[j]));
    });
    if (values.includes(null)) continue;
    found.x.push(place);
    found.low.push(values.reduce((a, b) => Math.min(a, b)));
    found.mean.push(values.reduce((a, b) => a + b) / values.length);
    found.high.push(values.reduce((a, b) => Math.max(a, b)));
  }
  return found.x.length ? found : null;
};
/** Curves of a number: each run's with its band over sequences; of grouped runs pale ones, and each setting's band over seeds. */
const curvesOf = (name) => {
  if (!compared) {
    return runs.flatMap((run, i) => {
      const on = placed(run);
      return [band(on, name, runColour(i)), curve(on, escaped(run.name), (record) => record[name], runColour(i), { hovertemplate: tip(name, run.name), meta: name })];
    });
  }
  const alone = runs.map((run, i) => {
    const shown_ = i === state.run;
    return curve({ ...placed(run), mode: "lines" }, escaped(run.name), (record) => record[name], runColour(i), {
      hovertemplate: tip(name, run.name), meta: name, showlegend: false, opacity: shown_ ? 1 : 0.35, line: { color: runColour(i), width: shown_ ? 2 : 1 },
    });
  });
  if (settings().length > 8) return alone;
  return [...alone, ...settings().flatMap((setting) => {
    const members = range(runs.length).filter((i) => runs[i].setting === setting);
    const tone = runColour(members[0]);
    const found = overSeeds(members, name);
    const legend = { name: escaped(`${setting} (${plural(members.length, "run")})`), legendgroup: setting, showlegend: true };
    if (!found) return [{ x: [null], y: [null], type: "scatter", mode: "lines", line: { color: tone, width: 2.5 }, ...legend }];
    return [
      { x: [...found.x, ...found.x.toReversed()], y: [...found.high, ...found.low.toReversed()], type: "scatter", mode: "lines", fill: "toself", fillcolor: tone, line: { color: tone, width: 0 }, opacity: 0.16, hoverinfo: "skip", showlegend: false, name: "seeds", meta: setting },
      { x: found.x, y: found.mean, type: "scatter", mode: "lines", line: { color: tone, width: 2.5 }, meta: "mean", ...legend,
        customdata: found.x.map((_, j) => [found.low[j], found.high[j]]),
        hovertemplate: `${sentence(fields[name].title)}, ${at()}: mean %{y:${d3form(fields[name].form)}}, %{customdata[0]:${d3form(fields[name].form)}} to %{customdata[1]:${d3form(fields[name].form)}}${unitOf(name)}<extra>${escaped(setting)}, ${plural(members.length, "run")}</extra>` },
    ];
  })];
};
/** All values of a number by run, for an axis. */
const valuesOf = (name) => runs.map((run) => [placed(run).records.map((record) => record[name])]);

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
  // a letter in the middle of each stretch, where no edge cuts it
  const ends = records.map(({ stage }, j) => (stage === records[j + 1]?.stage ? -1 : j)).filter((j) => j >= 0);
  const middles = new Set(ends.map((end, k) => Math.floor((end + (k ? ends[k - 1] + 1 : 0)) / 2)));
  return {
    type: "heatmap", x, y: [i], z: [records.map((record) => (record.stage === null ? null : STAGES.indexOf(record.stage)))], text: [records.map(({ stage }, j) => (stage === null || !middles.has(j) ? "" : initial(stage)))], texttemplate: "%{text}",
    customdata: [records.map((record) => record.stage)], textfont: { color: colour("card"), size: 11 },
    yaxis: "y2", ...(runs.length > 20 ? { texttemplate: "" } : {}), zmin: -0.5, zmax: STAGES.length - 0.5, showscale: false, name: "stages", meta: i,
    colorscale: STAGES.flatMap((stage, k) => [[k / STAGES.length, colour(stage)], [(k + 1) / STAGES.length, colour(stage)]]),
    hovertemplate: `Stage, ${at()}: %{customdata}<extra>${escaped(run.name)}</extra>`,
  };
});
/** When the rate left its floor, and its interval, where it has a place on the axis. */
const onsetOf = (run) => {
  const onset = run.onset[choice("x")];
  return !onset || (choice("scale") === "log" && onset[1] <= 0) ? null : onset;
};
/** Of one run a line, and a shade for the interval. */
const onsetShade = () => {
  const onset = runs.length === 1 && onsetOf(runs[0]);
  if (!onset) return [];
  const [value, low, high] = onset;
  const tone = runColour(0);
  return [
    { type: "rect", x0: low, x1: high, y0: 0, y1: 1, opacity: 0.13, yref: "y domain", fillcolor: tone, line: { width: 0 }, layer: "below" },
    { type: "line", x0: value, x1: value, y0: 0, y1: 1, yref: "y domain", line: { color: tone, width: 1, dash: "dot" }, layer: "below" },
  ];
};
/** Of several runs a point with its interval on the strip of each: shades would add up to a colour of no run. */
const onsetPoints = () => (runs.length === 1 ? [] : runs.flatMap((run, i) => {
  const onset = onsetOf(run);
  if (!onset) return [];
  const [value, low, high] = onset;
  const tone = colour("ink");
  return [{
    type: "scatter", x: [value], y: [i], yaxis: "y2", mode: "markers", name: "onset", meta: i, showlegend: false, cliponaxis: false,
    marker: { symbol: "diamond", size: 8, color: tone, line: { color: colour("card"), width: 1.5 } },
    error_x: { type: "data", symmetric: false, array: [high - value], arrayminus: [value - low], color: tone, thickness: 2, width: 4 },
    hovertemplate: `Onset of the sink rate, ${at()} (95 %: ${count(low)} to ${count(high)})<extra>${escaped(run.name)}</extra>`,
  }];
}));

/** Where something but the model changed: a line on every curve, named on the first. */
const noted = (of = runs) => of.flatMap((run) => run.marks).map((mark) => ({ ...mark, x: mark[choice("x")] }))
  .filter(({ x }) => x !== null && (choice("scale") === "linear" || x > 0));
const noteLines = (of) => noted(of).map(({ x }) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: colour("muted"), width: 1 }, layer: "below" }));
const noteNames = () => noted().map(({ x, what }) => ({
  x: choice("scale") === "log" ? Math.log10(x) : x, y: 1, yref: "paper", xanchor: "left", yanchor: "top", textangle: 90, showarrow: false, text: escaped(what), font: { color: colour("muted"), size: 11 },
}));

const PLACES = ["first_two_share", "first_two_gain", "depth", "reference_block"];
const drawSinkRate = () => {
  // hidden first, so that the chart beside it takes the room
  $("localization").parentElement.hidden = !PLACES.some((field) => some(valuesOf(field).flat(2))) && runs.every((run) => run.records.every((record) => record.untold));
  const strip = Math.min(0.45, 0.05 * runs.length);
  const tall = runs.length > 4 ? `${380 + 18 * runs.length}px` : "";
  for (const id of ["sink_rate", "localization"]) $(id).style.height = tall;
  const rates = valuesOf(rate).flat(2);
  $("rate_title").textContent = sentence(fields[rate].title);
  $("rate_help").textContent = fields[rate].help;
  Plotly.react("sink_rate", [...curvesOf(rate), ...stageStrips(), ...onsetPoints()], layout({
    showlegend: runs.length > 1, shapes: [...onsetShade(), ...noteLines()], annotations: [...noteNames(), ...emptyNote(rates)], xaxis: xAxis({ anchor: "y2" }),
    yaxis: axis({ range: [-0.02, 1.02], tickformat: ".0%", domain: [strip + 0.04, 1] }),
    yaxis2: axis({
      domain: [0, strip], range: [runs.length - 0.5, -0.5], showgrid: false, zeroline: false, ...(narrow() ? { tickfont: { size: 10, color: colour("muted") } } : {}),
      ...(runs.length > 1 ? { tickvals: range(runs.length), ticktext: runs.map((run) => escaped(short(run.name, narrow() ? 13 : 18))) } : { visible: false }),
    }),
  }), config);
  $("bands").textContent = compared
    ? (settings().length > 8 ? "The run in detail is coloured." : "Line: the mean of a setting's runs; band: from the smallest to the largest of them. Pale: each run.") + " Below: each run's stage, from the records up to each step, and its onset with its interval."
    : (rate === "sink_rate" ? "Band: 95 % over sequences. " : "") + (runs.length > 1 ? "Below: each run's stage, from the records up to each step, and its onset with its interval."
      : `${onsetOf(runs[0]) ? "Shaded: the onset. " : ""}Below: the stage, from the records up to each step.`);
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
  const line = { color: tone, width: compared && i !== state.run ? 1 : 2, ...(steps ? { shape: "hv" } : {}) };
  const plain = { yaxis, showlegend: false, mode: "lines", hoverinfo: "skip" };
  const value = (record) => record[field];
  const formed = on.records.map((record) => ({ ...record, intervals: record.formed ? record.intervals : {} }));
  return [
    ...(compared ? [] : [band({ ...on, records: formed }, field, tone, { yaxis })]),
    curve(on, "", value, "", { ...plain, line: { ...line, dash: "dot", width: 1.2 }, opacity: 0.45 }),
    curve(on, "", (record) => (record.formed ? value(record) : null), "", { ...plain, line }),
    curve(on, escaped(run.name), value, tone, {
      yaxis, showlegend, mode: "markers", meta: field,
      hovertemplate: on.records.map((record) => tip(field, run.name).replace("<extra>", `${record.formed || record.untold ? "" : ", no sink"}<extra>`)),
      marker: { color: tone, size: compared || on.mode === "lines" ? 0.1 : 5, symbol: on.records.map((record) => (record.formed ? "circle" : "circle-open")) },
    }),
  ];
};

const drawLocalization = () => {
  if ($("localization").parentElement.hidden) return;
  const panels = range(4).map((i) => [PLACES[i], [[0.79, 1], [0.53, 0.74], [0.27, 0.48], [0, 0.21]][i]]);
  const traces = runs.flatMap((run, i) => panels.flatMap(([field], j) =>
    asFormed(run, i, field, j ? `y${j + 1}` : "y", j === 0, fields[field].unit === "block")));
  const ranges = panels.map(([field]) => (fields[field].unit === "block" ? null : robustRange(valuesOf(field))));
  const axes = Object.fromEntries(panels.map(([field, domain], j) => [`yaxis${j ? j + 1 : ""}`, axis({
    ...(ranges[j]?.beyond ? { range: [Math.min(0, ranges[j].low), ranges[j].high] } : {}), title: fields[field].unit === "block" ? "first block" : fields[field].title.replace("first-two ", ""), domain, rangemode: "tozero", nticks: 4,
    ...(fields[field].form.endsWith("%") ? { tickformat: ".0%" } : fields[field].unit === "block" ? { tickformat: "d" } : {}),
    ...(runs.some((run) => run.records.some((record) => record[field] !== null)) ? {} : { range: [0, 1] }),
  })]));
  Plotly.react("localization", traces, layout({
    showlegend: runs.length > 1 && !compared, shapes: noteLines(), xaxis: xAxis({ anchor: "y4" }), ...axes,
    annotations: [...emptyNote(panels.flatMap(([field]) => valuesOf(field).flat(2)), "no sink has formed, so there is no state to locate"), ...panels.flatMap((_, j) => beyondNote(ranges[j], { yref: `y${j ? j + 1 : ""} domain` }))],
  }), config);
};

/** Any single number over training. */
const drawNumber = () => {
  offerFields("number_field", numbers(), "position_share");
  const name = $("number_field").value;
  if (!name) return;
  const { form, help, scale } = fields[name];
  $("number_help").textContent = help;
  const found = scale === "log" || fields[name].unit === "block" ? null : robustRange(valuesOf(name));
  Plotly.react("number", curvesOf(name), layout({
    showlegend: runs.length > 1, shapes: noteLines(), annotations: beyondNote(found), xaxis: xAxis(),
    yaxis: axis({
      title: titled(name), type: scale, ...(form.endsWith("%") ? { tickformat: "~%" } : {}),
      ...(scale === "log" ? logTicks(valuesOf(name).flat(2), 9) : found?.beyond ? { range: [Math.min(0, found.low), found.high] } : { rangemode: "tozero" }),
    }),
  }), config);
};

/** Block by step, the runs in equal panels on one scale of colour; on a phone one below the other. */
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
  const bulk = robustRange(ons.map(({ rows }) => range(largest(rows.map((row) => row.length), 0)).map((block) => rows.map((row) => row[block] ?? null).map((value) => (value === null ? null : scaled(value))))));
  const ends = bulk?.beyond ? [Math.max(least, bulk.low), Math.min(high, bulk.high)] : [least, high];
  const room = $("blocks").clientWidth - 110;
  const rowsOf = Math.ceil(runs.length / (narrow() ? 1 : Math.max(1, Math.min(runs.length, Math.floor(room / 220)))));
  const columnsOf = Math.ceil(runs.length / rowsOf);
  const tall = runs.length === 1 ? 300 : rowsOf === 1 ? 320 : 70 + 220 * rowsOf;
  const [across, down] = [44 / room, 64 / (tall - 70)];
  const [wide, deep] = [(1 - (columnsOf - 1) * across) / columnsOf, (1 - (rowsOf - 1) * down) / rowsOf];
  const place = (i) => {
    const [column, line] = [i % columnsOf, Math.floor(i / columnsOf)];
    const [left, top] = [column * (wide + across), 1 - line * (deep + down)];
    return { x: [left, left + wide], y: [Math.max(0, top - deep), top], first: column === 0, bottom: i + columnsOf >= runs.length };
  };
  const axes = {};
  const traces = ons.map(({ x, rows }, i) => {
    const suffix = i ? i + 1 : "";
    const height = largest(rows.map((row) => row.length), runs[i].model.blocks);
    const { x: domain, y, first, bottom } = place(i);
    axes[`xaxis${suffix}`] = xAxis({ showgrid: false, anchor: `y${suffix}`, domain, ...(i ? { matches: "x" } : {}), ...(bottom ? {} : { title: "" }) }, wide * room);
    axes[`yaxis${suffix}`] = axis({
      title: first ? "block" : "", showgrid: false, zeroline: false, autorange: "reversed", anchor: `x${suffix}`, domain: y, ...(height > 13 ? {} : { dtick: 1 }),
    });
    return {
      type: "heatmap", x, y: range(height), z: range(height).map((block) => rows.map((row) => scaled(row[block] ?? null))),
      customdata: range(height).map((block) => rows.map((row) => row[block] ?? null)),
      xaxis: `x${suffix}`, yaxis: `y${suffix}`, name: escaped(runs[i].name), meta: i, zmin: ends[0], zmax: ends[1], hoverongaps: false, colorscale: scaleOf(heats()),
      showscale: i === runs.length - 1,
      colorbar: { ...bar(titled(measure)), ...(logarithmic ? { tickvals: range(13).map((power) => power - 4), ticktext: range(13).map((power) => String(10 ** (power - 4))) } : form.endsWith("%") ? { tickformat: ".0%" } : {}) },
      hovertemplate: `${sentence(escaped(fields[measure].title))}, ${at()}, block %{y}: %{customdata:${d3form(form)}}${unitOf(measure)}<extra>${escaped(runs[i].name)}</extra>`,
    };
  });
  const names = runs.length === 1 ? [] : runs.map((run, i) => ({
    text: escaped(short(run.name, Math.floor((wide * room) / 7.5))), hovertext: escaped(run.name), xref: "paper", yref: "paper", x: place(i).x[0], y: place(i).y[1], xanchor: "left", yanchor: "bottom", showarrow: false,
    font: { color: compared && settings().length > 8 ? colour("ink") : runColour(i) },
  }));
  const left = runs.reduce((sum, run, i) => sum + placed(run).x.length - ons[i].x.length, 0);
  $("measured").textContent = help + (left ? ` ${plural(left, "record")} without it here.` : "") + (bulk?.beyond ? ` ${plural(bulk.beyond, "value")} beyond the scale of colour.` : "");
  $("blocks").style.height = `${tall}px`;
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
  $("norm_ratio").parentElement.hidden = !shown().records.some((record) => some(record.norm_ratio));
  if ($("norm_ratio").parentElement.hidden) return;
  Plotly.react("norm_ratio", [
    ...range(blocks + 1).map((block) => {
      const name = block < blocks ? `block ${block}` : "output";
      const tone = depthColour(block, blocks);
      return curve(on, name, (record) => record.norm_ratio[block], tone, {
        line: { color: tone, width: blocks > 12 ? 1.2 : 2 }, hovertemplate: tip("norm_ratio", name),
      });
    }),
    { x: [null], y: [null], type: "scatter", mode: "markers", hoverinfo: "skip",
      marker: { color: [0], cmin: 0, cmax: blocks, colorscale: scaleOf(depths()), showscale: true,
        colorbar: { ...bar("block"), ...(blocks > 12 ? {} : { tickvals: range(blocks + 1), ticktext: [...range(blocks), "output"] }) } } },
  ], layout({
    annotations: emptyNote(norms), showlegend: false, shapes: noteLines([shown()]), xaxis: xAxis(), yaxis: axis({ title: titled("norm_ratio"), type: "log", ...logTicks(norms, 10) }),
  }), config);
};

/** The life of every head: how many are sink heads, and since when each is one. */
const drawLives = () => {
  const { lives } = shown();
  $("lives").hidden = !lives;
  if (!lives) return;
  $("lives_told").textContent = `${sentence(lives.told)}.`;
  const field = choice("x") === "tokens" && lives.tokens.every((value) => value !== null) ? "tokens" : "steps";
  const at_ = field === "tokens" ? "%{x:,} tokens" : "step %{x:,}";
  const kept = range(lives.steps.length).filter((i) => choice("scale") === "linear" || lives[field][i] > 0);
  const x = kept.map((i) => lives[field][i]);
  const whole = (values) => (largest(values, 0) > 5 ? {} : { dtick: 1 });
  const bars = [["born", 1, colour("accent"), "Births"], ["died", -1, colour("mark"), "Deaths"]].map(([name, sign, tone, title]) => ({
    type: "scatter", mode: "lines", line: { shape: "hvh", width: 1.5, color: tone }, fill: "tozeroy", name: title, yaxis: "y2", x, y: kept.map((i) => sign * lives[name][i]),
    customdata: kept.map((i) => lives[name][i]), hovertemplate: `${title}, ${at_}: %{customdata} heads<extra></extra>`,
  }));
  Plotly.react("head_counts", [
    { type: "scatter", mode: x.length > 60 ? "lines" : "lines+markers", name: "Sink heads", x, y: kept.map((i) => lives.count[i]), line: { color: colour("ink"), width: 2 }, marker: { size: 5 }, hovertemplate: `Sink heads, ${at_}: %{y} heads<extra></extra>` }, ...bars,
  ], layout({
    xaxis: axis({ title: AXES[field === "tokens" ? "tokens" : "step"], type: choice("scale"), anchor: "y2", ...(choice("scale") === "log" ? logTicks(x, 6) : {}) }),
    yaxis: axis({ title: "sink heads", rangemode: "tozero", domain: [0.42, 1], ...whole(lives.count) }),
    yaxis2: axis({ title: "born, gone", domain: [0, 0.34], ...whole([...lives.born, ...lives.died]) }),
  }), config);
  const rows = range(lives.since.length);
  const columns = range(lives.since[0].length);
  const said = (i, j) => {
    if (lives.since[i][j] !== null) return `a sink head for good since step ${count(lives.since[i][j])}`;
    if (lives.ceased[i][j] !== null) return `ceased at step ${count(lives.ceased[i][j])}`;
    if (lives.births[i][j] === null) return "not measured";
    return lives.births[i][j] ? `comes and goes, born ${lives.births[i][j]} times` : "never a sink head";
  };
  const points = (of) => rows.flatMap((i) => columns.filter((j) => of(i, j)).map((j) => [j, i]));
  const marked = (name, symbol, found) => ({
    type: "scatter", mode: "markers", name, x: found.map(([j]) => j), y: found.map(([, i]) => i), marker: { symbol, size: 8, color: colour("mark") }, text: found.map(([j, i]) => said(i, j)),
    hovertemplate: "Block %{y}, head %{x}: %{text}<extra></extra>", showlegend: false,
  });
  Plotly.react("head_lives", [{
    type: "heatmap", x: columns, y: rows, z: lives.since, hoverongaps: true, colorscale: scaleOf(heats().toReversed()), xgap: 1, ygap: 1,
    text: rows.map((i) => columns.map((j) => said(i, j))), hovertemplate: "Block %{y}, head %{x}: %{text}<extra></extra>", colorbar: bar("since step"),
  },
  marked("ceased", "x-thin-open", points((i, j) => lives.ceased[i][j] !== null)),
  marked("comes and goes", "circle-open", points((i, j) => lives.since[i][j] === null && lives.ceased[i][j] === null && lives.births[i][j] > 0)),
  ], layout({
    plot_bgcolor: colour("gap"), xaxis: axis({ title: "head", showgrid: false, zeroline: false, ...(columns.length > 16 ? {} : { dtick: 1 }) }),
    yaxis: axis({ title: "block", showgrid: false, zeroline: false, autorange: "reversed", ...(rows.length > 16 ? {} : { dtick: 1 }) }),
  }), config);
};

const drawCurves = () => {
  drawLeftOut();
  drawSinkRate();
  drawLocalization();
  drawBlocks();
  drawNorms();
  drawLives();
  drawNumber();
};

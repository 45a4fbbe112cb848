// One tensor in full: both sides, how far off it is, where, and its elements.

const STAT_NAMES = {
  min: "min",
  max: "max",
  mean: "mean",
  std: "std",
  l2: "l2 norm",
  num_zero: "zeros",
  num_nan: "NaN",
  num_posinf: "+inf",
  num_neginf: "−inf",
};

function section(title, ...children) {
  return make("section", {}, make("h3", {}, title), ...children);
}

function sidesTable(row, sides) {
  const line = (name, one, other, quiet) =>
    make(
      "tr",
      { class: !quiet && one !== other ? "changed" : null },
      make("th", { scope: "row" }, name),
      ...[one, other].map((text) => make("td", {}, text)),
    );
  const types = [row.expected, row.actual].map((type) => (type ?? "–").split(/ (?=\[)/));
  const stats = row.extra ? [row.extra.expected_stats, row.extra.actual_stats] : [null, null];
  const lines = [
    line("dtype", types[0][0], types[1][0]),
    line("shape", types[0][1] ?? "–", types[1][1] ?? "–"),
  ];
  if (stats.some(Boolean)) {
    // Where the bytes are the same, the stats of one side are those of the other.
    if (["identical", "renamed", "requires_grad"].includes(row.kind)) stats[1] ??= stats[0];
    const known = stats.every(Boolean);
    DATA.columns.stats.forEach((name, index) => {
      const [one, other] = stats.map((some) => (some ? statistic(name, some[index]) : "–"));
      const isCount = index >= 5 && name !== "num_zero";
      if (isCount && [one, other].every((text) => ["0", "–"].includes(text))) return;
      lines.push(line(STAT_NAMES[name], one, other, !known));
    });
  }
  lines.push(
    line("container", sides[0].container, sides[1].container, true),
    line("section", sides[0].section || "–", sides[1].section || "–", true),
  );
  return make(
    "table",
    { class: "sides-table" },
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        make("td", {}),
        make("th", { scope: "col" }, "expected"),
        make("th", { scope: "col" }, "actual"),
      ),
    ),
    make("tbody", {}, ...lines),
  );
}

// How far off, on one log axis with the tolerance.
function distances(difference) {
  const { atol, rms, max_abs: max, min_atol: least } = difference;
  const positive = [atol, rms, ...max, ...least].filter(
    (value) => value > 0 && Number.isFinite(value),
  );
  const lines = [
    ["max |d|", max, interval(max)],
    [
      "rms",
      [rms, rms],
      Number.isNaN(rms) ? "unknown" : `${difference.is_exact ? "" : "about "}${short(rms)}`,
    ],
    ["passes at atol", least, least[0] === Infinity ? "none" : interval(least)],
  ];
  const logs = positive.map(Math.log10);
  const low = Math.floor(Math.min(...logs)) - 1;
  const high = Math.max(low + 3, Math.ceil(Math.max(...logs)) + 1);
  const x = (value) => Math.max(0, Math.min(100, (100 * (Math.log10(value) - low)) / (high - low)));
  const figure = make("div", { class: "distances" });
  for (const [name, [from, to], text] of lines) {
    const track = make("div", { class: "track", "aria-hidden": "true" });
    if (atol > 0) {
      const limit = make("i", { class: "limit" });
      limit.style.left = `${x(atol)}%`;
      track.append(limit);
    }
    const isKnown =
      !Number.isNaN(from) &&
      from !== Infinity &&
      (from > 0 || Number.isFinite(to)) &&
      positive.length;
    if (isKnown && to > 0) {
      const bar = make("i", { class: from === to ? "bar point" : "bar" });
      const [left, right] = [from > 0 ? x(from) : 0, Number.isFinite(to) ? x(to) : 100];
      bar.style.left = `${left}%`;
      bar.style.width = `${right - left}%`;
      track.append(bar);
    }
    figure.append(
      make("span", { class: "what" }, name),
      track,
      make("span", { class: "value" }, text),
    );
  }
  const limit = difference.exact
    ? "The policy is exact: nothing is allowed."
    : `The line is atol ${general(atol)}; rtol is ${general(difference.rtol)}.`;
  const scale = positive.length ? ` Log scale, 1e${low} to 1e${high}.` : "";
  return [figure, make("p", { class: "muted" }, limit + scale)];
}

function whereabouts(difference, { strip, where }) {
  if (!strip) return section("Where", make("p", {}, `${capital(where)}.`));
  const values = stripValues(strip);
  const allowed =
    difference.ratio > 0 && Number.isFinite(difference.ratio)
      ? difference.rms / difference.ratio
      : difference.atol;
  const changed = values.filter(Boolean).length;
  const peak = values.indexOf(Math.max(...values));
  const words = `${count(changed)} of ${plural(values.length, "run")} changed, most in run ${peak + 1}: rms ${values[peak].toExponential(2)}`;
  const cells = values.map((value, index) =>
    make("i", {
      class: value ? `cell ${shade("different", value / allowed)}` : "cell same",
      title: `run ${index + 1}: ${value ? `rms about ${short(value)}` : "as expected"}`,
    }),
  );
  return section(
    "Where",
    make("div", { class: "strip", role: "img", "aria-label": words }, ...cells),
    make(
      "p",
      { class: "ends", "aria-hidden": "true" },
      make("span", {}, "first element"),
      make("span", {}, `last of ${count(difference.numel)}`),
    ),
    make("p", {}, `${words}${where ? `; ${where}` : ""}.`),
  );
}

function elementsTable(difference, { elements }) {
  const beyond = difference.num_beyond;
  const more = beyond === null ? 0 : beyond - elements.length;
  const head = ["index", "expected", "actual", "difference"];
  return section(
    difference.is_exact ? "Elements" : "Elements, about",
    make(
      "table",
      { class: "elements" },
      make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))),
      make(
        "tbody",
        {},
        ...elements.map(([index, ...numbers]) =>
          make(
            "tr",
            {},
            make("th", { scope: "row" }, `[${index}]`),
            ...numbers.map((text) => make("td", {}, text)),
          ),
        ),
      ),
    ),
    more > 0
      ? make("p", { class: "muted" }, `and ${plural(more, "more element")} beyond the tolerance`)
      : null,
  );
}

function findingLines(finding) {
  const lines = [
    ...finding.causes.map((text) => make("p", { class: "cause" }, make("b", {}, capital(text)), ".")),
    make(
      "p",
      { class: "what-is" },
      mark(DATA.families[finding.kind]),
      " ",
      make("b", {}, finding.kind),
      `: ${ABOUT[finding.kind]}.`,
    ),
  ];
  if (finding.actual_key)
    lines.push(make("p", {}, "Actual key: ", make("code", {}, finding.actual_key)));
  if (finding.expected !== null || finding.actual !== null) {
    lines.push(
      make(
        "dl",
        { class: "pair" },
        make("dt", {}, "expected"),
        make("dd", {}, finding.expected ?? "nothing"),
        make("dt", {}, "actual"),
        make("dd", {}, finding.actual ?? "nothing"),
      ),
    );
  }
  if (finding.difference)
    lines.push(make("p", { class: "why" }, `${capital(finding.difference.why)}.`));
  return lines;
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function detailOf(row, { stage, place, remark, onclose, onstep }) {
  const { difference } = row;
  const position = `${stage.stage === "outputs" ? "place" : "row"} ${count(place + 1)} of ${count(stage.rows.length)}`;
  const size = row.isTensor ? `, ${bytes(row.nbytes)}` : "";
  const found = [
    make(
      "div",
      { class: "bar-of-buttons" },
      make("button", { type: "button", onclick: () => onstep(-1) }, "Previous"),
      make("button", { type: "button", onclick: () => onstep(1) }, "Next"),
      make("button", { type: "button", class: "close", onclick: onclose }, "Close"),
    ),
    make("h2", { id: "detail-title", tabindex: "-1" }, ...breakable(row.key)),
    make("p", { class: "muted" }, `${position}${size}${remark ? ` · ${remark}` : ""}`),
  ];
  if (!row.findings.length) {
    found.push(
      make(
        "p",
        { class: "what-is" },
        mark(row.family),
        " ",
        make("b", {}, row.kind),
        `: ${ABOUT[row.kind]}.`,
      ),
    );
  }
  for (const finding of row.findings) found.push(...findingLines(finding));
  if (difference) {
    const counts = [];
    if (difference.num_differing !== null)
      counts.push(
        `${count(difference.num_differing)} of ${plural(difference.numel, "element")} differ, ${count(difference.num_beyond)} beyond the tolerance.`,
      );
    if (difference.chance)
      counts.push(`The chance that this verdict is wrong is below ${short(difference.chance)}.`);
    found.push(
      section(
        "How far",
        ...distances(difference),
        counts.length ? make("p", {}, counts.join(" ")) : null,
      ),
    );
    if (row.extra?.strip || row.extra?.where) found.push(whereabouts(difference, row.extra));
    if (row.extra?.elements.length) found.push(elementsTable(difference, row.extra));
    if (!row.extra)
      found.push(
        make(
          "p",
          { class: "muted" },
          "Where it differs, its elements and its statistics are left out of this page for its size; a .json report has them.",
        ),
      );
  }
  if (row.isTensor) found.push(section("Both sides", sidesTable(row, stage.sides)));
  return found;
}

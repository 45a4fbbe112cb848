// The table: all rows of a stage, sorted by a click on its head.

const MAX_SHOWN = 5000;
const AT_ONCE = 200; // rows that are laid out before the page answers; the rest follow
const collator = new Intl.Collator("en", { numeric: true });

function amount(row, name) {
  const value = row.difference ? row.difference[name] : NaN;
  return Array.isArray(value) ? value[0] : value;
}

const byText = (textOf) => (a, b) => collator.compare(textOf(a.row), textOf(b.row));
const byNumber = (numberOf) => (a, b) => {
  // What has no number is less than all that have one.
  const [x, y] = [a, b].map(({ row }) => (Number.isNaN(numberOf(row)) ? -1 : numberOf(row)));
  return x < y ? -1 : x > y ? 1 : 0;
};
const byAmount = (name) => byNumber((row) => amount(row, name));
const bySeverity = (a, b) =>
  SEVERITY.indexOf(b.row.kind) - SEVERITY.indexOf(a.row.kind) || byAmount("ratio")(a, b);

// `first` is the direction of the first click; `wide` ones are left out on a phone.
const COLUMNS = [
  {
    name: "place",
    label: "#",
    title: "Place in the model",
    first: "ascending",
    number: true,
    wide: true,
    sort: (a, b) => a.place - b.place,
  },
  { name: "key", label: "Name", first: "ascending", sort: byText((row) => row.key) },
  { name: "kind", label: "Verdict", first: "descending", sort: bySeverity },
  { name: "type", label: "Type", first: "ascending", wide: true, sort: byText(typeOf) },
  {
    name: "size",
    label: "Size",
    first: "descending",
    number: true,
    wide: true,
    sort: byNumber((row) => row.nbytes),
  },
  {
    name: "max",
    label: "max |d|",
    first: "descending",
    number: true,
    wide: true,
    sort: byAmount("max_abs"),
  },
  {
    name: "rms",
    label: "rms",
    first: "descending",
    number: true,
    wide: true,
    sort: byAmount("rms"),
  },
  {
    name: "ratio",
    label: "× tol.",
    title: "rms, in times of what the tolerance allows",
    first: "descending",
    number: true,
    sort: byAmount("ratio"),
  },
];

function createTable(table, { onopen, onmove }) {
  const body = table.querySelector("tbody");
  const keys = roving(body, { spatial: false, onopen, onmove });
  const heads = COLUMNS.map((column) => {
    const button = make(
      "button",
      {
        type: "button",
        "aria-label": column.title ?? null,
        title: column.title ?? null,
        onclick: () => sortBy(column),
      },
      column.label,
    );
    return make("th", { scope: "col", class: classes(column) }, button);
  });
  table.querySelector("thead").append(make("tr", {}, ...heads));
  let lines = new Map();
  let fitting = [];
  let shown = () => true;
  let timer = null;
  let sorting = null;

  function classes(column) {
    return [column.name, column.number && "number", column.wide && "wide"]
      .filter(Boolean)
      .join(" ");
  }

  function elementOf(line) {
    line.element ??= draft(line);
    return line.element;
  }

  function draft({ row, place, remark }) {
    const item = make(
      "button",
      { type: "button", class: "item", tabindex: "-1" },
      ...breakable(row.key),
    );
    item.row = row;
    const { difference } = row;
    const cells = {
      place: String(place + 1),
      type: typeOf(row),
      size: row.isTensor ? bytes(row.nbytes) : "",
      max: difference ? interval(difference.max_abs) : "",
      rms: difference ? short(difference.rms) : "",
      ratio: difference ? times(difference.ratio) : "",
    };
    return make(
      "tr",
      { class: remark ? "remarked" : null },
      ...COLUMNS.map((column) => {
        if (column.name === "key") {
          return make(
            "th",
            { scope: "row", class: "key" },
            item,
            remark ? make("span", { class: "remark" }, remark) : null,
          );
        }
        if (column.name === "kind")
          return make("td", { class: "kind" }, mark(row.family), ` ${row.kind}`);
        return make("td", { class: classes(column) }, cells[column.name]);
      }),
    );
  }

  function sortBy(column) {
    const turned = { ascending: "descending", descending: "ascending" };
    const direction = sorting?.column === column ? turned[sorting.direction] : column.first;
    sorting = { column, direction };
    draw();
  }

  function draw() {
    const { column, direction } = sorting;
    const sign = direction === "descending" ? -1 : 1;
    const order = (a, b) => sign * column.sort(a, b) || a.place - b.place;
    COLUMNS.forEach((one, index) => {
      heads[index].setAttribute("aria-sort", one === column ? direction : "none");
    });
    fitting = [...lines.values()].filter(({ row }) => shown(row)).sort(order);
    clearTimeout(timer);
    body.replaceChildren();
    fill(0);
    keys.reset();
    return fitting.length;
  }

  function fill(start) {
    const stop = Math.min(start + AT_ONCE, fitting.length, MAX_SHOWN);
    body.append(...fitting.slice(start, stop).map(elementOf));
    if (stop < Math.min(fitting.length, MAX_SHOWN)) timer = setTimeout(fill, 0, stop);
  }

  return {
    // Worst first, but what was computed in the order in which it was.
    show(rows, { inOrder, remarks }) {
      lines = new Map(
        rows.map((row, place) => [row, { row, place, remark: remarks.get(row), element: null }]),
      );
      const column = COLUMNS.find(({ name }) => name === (inOrder ? "place" : "kind"));
      sorting = { column, direction: column.first };
    },
    filter(predicate) {
      shown = predicate;
      return draw();
    },
    place: (row) => lines.get(row).place,
    element: (row) => elementOf(lines.get(row)),
    visible: () => fitting.map(({ row }) => row),
  };
}

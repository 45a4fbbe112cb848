// The page: which stage is looked at, what is filtered, what is open.

const find = (id) => document.getElementById(id);

function start() {
  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  }
  if (STAGES.length) explore();
}

async function copy(button) {
  const text = button.dataset.copy;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Where the clipboard is not to be had: the command is marked, to be copied by hand.
    getSelection().selectAllChildren(button.parentElement.querySelector("code"));
    done = false;
  }
  button.firstChild.data = done ? "Copied" : "Marked";
  setTimeout(() => {
    button.firstChild.data = "Copy";
  }, 2000);
}

function explore() {
  const detail = find("detail");
  const map = find("map");
  const chosenKinds = new Set();
  let stage = null;
  let rows = [];
  let remarks = new Map();
  let tiles = new Map();
  let open = null;
  let opener = null;

  const picks = {
    onopen: (row, element, byKey) => show(row, element, byKey),
    onmove: (row, element) => {
      read(row);
      if (open) show(row, element, false);
    },
  };
  const table = createTable(find("table"), picks);
  const mapKeys = roving(map, { spatial: true, ...picks });

  function select(index) {
    stage = STAGES[index];
    rows = stage.rows.map((number) => ROWS[number]);
    remarks = new Map();
    for (const place of stage.inputs) remarks.set(rows[place], "an input of what first diverges");
    if (stage.diverges !== null) remarks.set(rows[stage.diverges], "first diverges");
    const inOrder = stage.stage === "outputs";
    for (const view of document.querySelectorAll(".view"))
      view.hidden = view.id !== `stage-${index}`;
    for (const button of document.querySelectorAll("button.stage")) {
      button.disabled = false;
      if (Number(button.dataset.stage) === index) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    find("map-title").textContent = inOrder
      ? "Places in the order of execution"
      : "Map of the model";
    map.className = inOrder ? "order" : "map";
    map.setAttribute("role", "listbox");
    map.setAttribute(
      "aria-label",
      `${find("map-title").textContent}, ${count(rows.length)} in all`,
    );
    legend(inOrder);
    close();
    map.replaceChildren();
    tiles = new Map(rows.filter((row) => row.isTensor).map((row) => [row, tile(row)]));
    table.show(rows, { inOrder, remarks });
    kinds();
    draw();
    filter();
    read(null);
  }

  function openDivergence() {
    const row = rows[stage.diverges];
    show(row, tiles.get(row), true);
  }

  function tile(row) {
    const remark = remarks.get(row);
    const step = row.difference ? level(row.difference.ratio) : null;
    const element = make("div", {
      class: `item tile ${shadeOf(row)}${step === null ? "" : ` h${step}`}${remark ? " remarked" : ""}${remark === "first diverges" ? " diverges" : ""}`,
      role: "option",
      tabindex: "-1",
      "aria-selected": "false",
      "aria-label": `${inWords(row)}${remark ? `, ${remark}` : ""}`,
    });
    element.row = row;
    return element;
  }

  function draw() {
    const shown = [...tiles.keys()];
    (stage.stage === "outputs" ? drawOrder : drawMap)(map, shown, tiles);
    mapKeys.reset();
  }

  // What is under the pointer, or in focus.
  function read(row) {
    find("readout").replaceChildren(
      ...(row
        ? [mark(row.family), ` ${inWords(row)}`]
        : [
            `${plural(tiles.size, stage.stage === "outputs" ? "place" : "tensor")}, ${bytes([...tiles.keys()].reduce((sum, one) => sum + one.nbytes, 0))}`,
          ]),
    );
  }

  function legend(inOrder) {
    const swatch = (family, step) =>
      make("i", { class: `swatch ${family}${step === null ? "" : ` l${step}`}` });
    const present = new Set(rows.filter((row) => row.isTensor).map((row) => row.family));
    const plain = {
      identical: "identical",
      structure: "missing, or of another form",
      ignored: "ignored",
    };
    const scaled = ["close", "undecided", "different"].filter((family) => present.has(family));
    const parts = Object.entries(plain)
      .filter(([family]) => present.has(family))
      .map(([family, words]) =>
        make("span", { class: "entry" }, swatch(family, null), ` ${words}`),
      );
    for (const family of scaled) {
      const steps = Array.from({ length: LEVELS }, (_, step) => swatch(family, step));
      steps.splice(4, 0, make("i", { class: "tick" }));
      parts.push(
        make(
          "span",
          { class: "entry" },
          make("span", { class: "ramp", "aria-hidden": "true" }, ...steps),
          ` ${family}`,
        ),
      );
    }
    if (stage.diverges !== null) {
      parts.push(
        make(
          "span",
          { class: "entry" },
          make("i", { class: "swatch diverges different" }),
          " first diverges",
        ),
      );
      parts.push(
        make(
          "span",
          { class: "entry" },
          make("i", { class: "swatch input-of identical" }),
          " its inputs",
        ),
      );
    }
    const size = inOrder ? "" : "Area: size in bytes, the smallest enlarged. ";
    const depth = scaled.length
      ? `Shade${inOrder ? " and height" : ""}: rms of the difference relative to the tolerance, a decade a step; the bar marks the tolerance.`
      : "";
    find("legend").replaceChildren(...parts, make("span", { class: "muted" }, size + depth));
  }

  // The filter.

  function kinds() {
    const numbers = new Map();
    for (const row of rows) numbers.set(row.kind, (numbers.get(row.kind) ?? 0) + 1);
    chosenKinds.clear();
    const buttons = SEVERITY.filter((kind) => numbers.has(kind)).map((kind) => {
      const button = make(
        "button",
        { type: "button", class: "kind", "aria-pressed": "false", title: ABOUT[kind] },
        mark(DATA.families[kind]),
        ` ${kind} `,
        make("b", {}, count(numbers.get(kind))),
      );
      button.addEventListener("click", () => {
        const pressed = !chosenKinds.delete(kind);
        if (pressed) chosenKinds.add(kind);
        button.setAttribute("aria-pressed", String(pressed));
        filter();
      });
      return button;
    });
    find("filter-kinds").replaceChildren(make("legend", { class: "said" }, "Kinds"), ...buttons);
  }

  function filter() {
    const words = find("filter-text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const verdict = {
      all: () => true,
      notable: (row) => !["identical", "ignored"].includes(row.kind),
      fails,
      undecided: (row) => row.kind === "undecided",
      passes: (row) => ["identical", "close"].includes(row.kind),
    }[find("filter-verdict").value];
    const shown = (row) =>
      verdict(row) &&
      (!chosenKinds.size || chosenKinds.has(row.kind)) &&
      words.every((word) => row.search.includes(word));
    const number = table.filter(shown);
    for (const [row, element] of tiles) element.classList.toggle("out", !shown(row));
    mapKeys.reset();
    const limit = number > MAX_SHOWN ? `, the first ${count(MAX_SHOWN)} of them in the table` : "";
    find("shown").textContent = `${count(number)} of ${count(rows.length)} shown${limit}`;
  }

  // The details.

  function show(row, element, byKey) {
    if (open) unmark();
    open = row;
    if (element) opener = element;
    tiles.get(row)?.setAttribute("aria-selected", "true");
    table.element(row)?.classList.add("open");
    detail.replaceChildren(
      ...detailOf(row, {
        stage,
        place: table.place(row),
        remark: remarks.get(row),
        onclose: close,
        onstep: step,
      }),
    );
    detail.hidden = false;
    find("explorer").classList.add("with-detail");
    detail.scrollTop = 0;
    read(row);
    if (byKey) find("detail-title").focus();
  }

  function unmark() {
    tiles.get(open)?.setAttribute("aria-selected", "false");
    table.element(open)?.classList.remove("open");
  }

  function close() {
    if (!open) return;
    const inside = detail.contains(document.activeElement);
    unmark();
    open = null;
    detail.hidden = true;
    find("explorer").classList.remove("with-detail");
    detail.replaceChildren();
    if (inside && opener?.isConnected) opener.focus();
  }

  function step(by) {
    const visible = table.visible();
    const next = visible[visible.indexOf(open) + by];
    if (!next) return;
    show(next, table.element(next).querySelector(".item"), false);
    detail.querySelectorAll(".bar-of-buttons button")[by < 0 ? 0 : 1].focus();
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && open) close();
  });
  map.addEventListener("mouseover", (event) => read(event.target.closest(".item")?.row ?? null));
  map.addEventListener("focusin", (event) => read(event.target.row ?? null));
  find("filter").addEventListener("input", filter);
  find("filter").addEventListener("submit", (event) => event.preventDefault());
  find("filter").addEventListener("reset", () => {
    chosenKinds.clear();
    for (const button of document.querySelectorAll("#filter-kinds button"))
      button.setAttribute("aria-pressed", "false");
    setTimeout(filter); // when the fields are empty
  });
  for (const button of document.querySelectorAll("button.stage")) {
    button.addEventListener("click", () => select(Number(button.dataset.stage)));
  }
  for (const button of document.querySelectorAll("button.open-divergence")) {
    button.hidden = false;
    button.addEventListener("click", openDivergence);
  }
  find("explorer").hidden = false;
  select(DATA.first);
  let width = map.clientWidth;
  new ResizeObserver(() => {
    if (map.clientWidth === width) return;
    width = map.clientWidth;
    if (stage.stage !== "outputs") draw();
  }).observe(map);
}

start();

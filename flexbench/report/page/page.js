"use strict";
// What the page can do beyond being read: tables that sort and filter, rows that open, charts.
// Texts from results files come in as text (textContent, createTextNode), never as HTML.
(() => {
  document.documentElement.classList.add("has-scripts");

  // An element with attributes and children, which are elements or texts.
  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // Tables

  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

  // What a cell is sorted by: [rank, value]; numbers come before texts, and what is not known last.
  function sortKey(cell) {
    if (cell.hasAttribute("data-unknown")) return [2, ""];
    const value = cell.getAttribute("data-value");
    return value === null ? [1, ownText(cell)] : [0, Number(value)];
  }

  // Without what marks it as the best, or as mixed.
  function ownText(cell) {
    if (cell.firstElementChild === null) return cell.textContent;
    const copy = cell.cloneNode(true);
    for (const extra of copy.querySelectorAll(".best, .mark, .sign, .unseen")) extra.remove();
    return copy.textContent.trim();
  }

  function compareKeys([rank, one], [otherRank, other], sign) {
    if (rank === 2 || otherRank === 2) return rank - otherRank; // whichever way it is sorted
    if (rank !== otherRank) return sign * (rank - otherRank);
    return sign * (rank === 0 ? one - other : collator.compare(one, other));
  }

  // The rows of a table in their first order, each with the row that was opened below it, if any.
  function rowsOf(table) {
    return Array.from(table.tBodies[0].rows, (row) => ({ row, opened: null, text: null }));
  }

  function inOrder(rows, column, direction) {
    if (direction === "none") return rows;
    const sign = direction === "ascending" ? 1 : -1;
    return rows
      .map((entry) => ({ entry, key: sortKey(entry.row.cells[column]) }))
      .sort((one, other) => compareKeys(one.key, other.key, sign)) // stable: ties stay in order
      .map(({ entry }) => entry);
  }

  const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

  function makeSortable(table, rows) {
    const headings = Array.from(table.tHead.rows[0].cells);
    headings.forEach((heading, column) => {
      if (!heading.classList.contains("sortable")) return;
      const label = element("span");
      label.append(...heading.childNodes);
      const button = element("button", { type: "button" }, label);
      heading.append(button);
      button.addEventListener("click", () => {
        const direction = NEXT[heading.getAttribute("aria-sort") ?? "none"];
        for (const other of headings) other.removeAttribute("aria-sort");
        if (direction !== "none") heading.setAttribute("aria-sort", direction);
        const inside = document.createDocumentFragment();
        for (const { row, opened } of inOrder(rows, column, direction)) {
          inside.append(row, ...(opened ? [opened] : []));
        }
        table.tBodies[0].append(inside);
      });
    });
  }

  // What a row says, without the links to its runs; between cells something that no word has.
  function textOf(row) {
    const cells = Array.from(row.cells).filter((cell) => !cell.classList.contains("runs"));
    return cells.map((cell) => cell.textContent.toLowerCase()).join("\n");
  }

  function makeFilter(grid, rows) {
    const field = grid.querySelector("input[type=search]");
    if (field === null) return;
    const counted = grid.querySelector(".counted");
    let waiting = 0;
    function filter() {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const entry of rows) {
        entry.text ??= textOf(entry.row);
        const isShown = words.every((word) => entry.text.includes(word));
        entry.row.hidden = !isShown;
        if (entry.opened) entry.opened.hidden = !isShown || !isOpen(entry);
        if (isShown) shown += 1;
      }
      const all = `${rows.length} ${rows.length === 1 ? "row" : "rows"}`;
      counted.textContent = words.length > 0 ? `${shown} of ${all}` : all;
    }
    field.addEventListener("input", () => {
      clearTimeout(waiting); // one answer for a word, not one for each of its letters
      waiting = setTimeout(filter, 120);
    });
  }

  // Columns: as many as there is room for, until somebody wants all

  const isNarrow = matchMedia("(max-width: 40rem)"); // rows are cards there: page.css
  const MOST_IN_CARD = 9;

  // A text as CSS has it: nothing in it ends it.
  function quoted(text) {
    const escaped = text.replace(/[^ \w./%]/gu, (one) => `\\${one.codePointAt(0).toString(16)} `);
    return `"${escaped}"`;
  }

  // An empty rule of our style sheet: one rule hides a column of however many rows.
  function addRule(text) {
    const sheet = document.styleSheets[0];
    return sheet.cssRules[sheet.insertRule(text, sheet.cssRules.length)];
  }

  // What stands above a column stands in each cell of a card.
  function labelCards(grid, headings) {
    headings.forEach((heading, column) => {
      if (heading.classList.contains("runs")) return;
      const words = Array.from(heading.childNodes, (node) => node.textContent.trim());
      const text = quoted(words.filter(Boolean).join(" "));
      addRule(
        `@media (max-width: 40rem) { #${grid.id} tr:not(.opened) > td:nth-child(${column + 1})` +
          `::before { content: ${text} } }`,
      );
    });
  }

  function makeFitting(grid, table) {
    const headings = Array.from(table.tHead.rows[0].cells);
    const scroll = grid.querySelector(".scroll");
    const button = grid.querySelector(".more");
    const sideways = grid.querySelector(".sideways");
    const hasCards = grid.classList.contains("cards");
    const optional = headings
      .filter((heading) => heading.dataset.drop)
      .sort((one, other) => one.dataset.drop - other.dataset.drop);
    const numValues = headings.filter((one) => !one.classList.contains("runs")).length;
    const rule = addRule(".none { display: none }");
    if (hasCards) labelCards(grid, headings);
    let widths = null;
    let room = 0;
    let isAll = false;

    function withoutRoom() {
      const left = [...optional];
      const gone = [];
      if (hasCards && isNarrow.matches) {
        while (left.length > 0 && numValues - gone.length > MOST_IN_CARD) {
          gone.push(left.shift());
        }
        return gone;
      }
      if (widths === null) {
        rule.selectorText = ".none"; // they are measured as long as all are there
        widths = new Map(headings.map((heading) => [heading, heading.offsetWidth]));
      }
      let width = Array.from(widths.values()).reduce((sum, one) => sum + one, 0);
      while (left.length > 0 && width > room) {
        gone.push(left.shift());
        width -= widths.get(gone.at(-1));
      }
      return gone;
    }

    function hint() {
      const rest = scroll.scrollWidth - scroll.clientWidth - scroll.scrollLeft;
      scroll.parentElement.classList.toggle("goes-left", scroll.scrollLeft > 1);
      scroll.parentElement.classList.toggle("goes-right", rest > 1);
      sideways.hidden = scroll.scrollWidth <= scroll.clientWidth + 1;
    }

    function fit() {
      const gone = withoutRoom();
      const places = (isAll ? [] : gone).map(
        (heading) => `#${grid.id} tr:not(.opened) > :nth-child(${heading.cellIndex + 1})`,
      );
      rule.selectorText = places.join(", ") || ".none";
      button.hidden = gone.length === 0;
      button.textContent = isAll ? "Fewer columns" : `More columns (${gone.length})`;
      button.setAttribute("aria-expanded", String(isAll));
      hint();
    }

    button.setAttribute("aria-controls", table.id);
    button.addEventListener("click", () => {
      isAll = !isAll;
      fit();
    });
    scroll.addEventListener("scroll", hint, { passive: true });
    // It is 0 wide as long as it is in something closed.
    new ResizeObserver(() => {
      if (scroll.clientWidth === 0 || scroll.clientWidth === room) return;
      room = scroll.clientWidth;
      fit();
    }).observe(scroll);
  }

  // Rows that open

  function isOpen({ row }) {
    return row.querySelector(".toggle").getAttribute("aria-expanded") === "true";
  }

  // A copy of a run's details from further down the page.
  function runCopy(id, isOnly) {
    const run = document.getElementById(`run-${id}`);
    if (run === null) return element("p", {}, `Run ${id}: its details are not on this page.`);
    const copy = run.cloneNode(true);
    copy.removeAttribute("id");
    copy.open = isOnly;
    return copy;
  }

  function openedRow(row, id) {
    const ids = row.dataset.runs.split(" ");
    const stay = element("div", { class: "stay" });
    stay.append(...ids.map((run) => runCopy(run, ids.length === 1)));
    const cell = element("td", { colspan: row.cells.length }, stay);
    return element("tr", { class: "opened", id }, cell);
  }

  function makeOpenable(grid, rows) {
    const entries = new Map(rows.map((entry) => [entry.row, entry]));
    let count = 0;
    grid.addEventListener("click", (event) => {
      const toggle = event.target.closest(".toggle");
      if (toggle === null) return;
      const entry = entries.get(toggle.closest("tr"));
      if (entry.opened === null) {
        count += 1;
        entry.opened = openedRow(entry.row, `${grid.id}-opened-${count}`);
        toggle.setAttribute("aria-controls", entry.opened.id);
        entry.row.after(entry.opened);
      }
      const willOpen = toggle.getAttribute("aria-expanded") !== "true";
      toggle.setAttribute("aria-expanded", String(willOpen));
      entry.opened.hidden = !willOpen;
    });
  }

  for (const grid of document.querySelectorAll(".grid")) {
    const table = grid.querySelector("table");
    const rows = rowsOf(table);
    makeFitting(grid, table);
    makeSortable(table, rows);
    makeFilter(grid, rows);
    makeOpenable(grid, rows);
  }

  // Runs

  async function copyText(text) {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    // Browsers that do not give files from disk the clipboard have the older way.
    const area = element("textarea", { readonly: "" });
    area.value = text;
    document.body.append(area);
    area.select();
    const isDone = document.execCommand("copy");
    area.remove();
    if (!isDone) throw new Error("the browser refuses it");
  }

  document.addEventListener("click", async (event) => {
    const button = event.target.closest(".copy");
    if (button === null) return;
    const data = document.getElementById(`run-${button.dataset.run}-json`);
    const said = button.parentElement.querySelector("[role=status]");
    try {
      await copyText(JSON.stringify(JSON.parse(data.textContent), null, 2));
      said.textContent = "Copied.";
    } catch (error) {
      said.textContent = `It could not be copied: ${error.message}.`;
    }
  });

  // Charts

  const tip = element("div", { class: "tip", "aria-hidden": "true" });
  tip.hidden = true;
  document.body.append(tip);

  // Called by Vega with what a mark has to say: a text, or an object of names and values.
  function showTip(_handler, event, _item, value) {
    tip.hidden = value === null || value === undefined || value === "";
    if (tip.hidden) return;
    const lines =
      typeof value === "object"
        ? Object.entries(value).map(([name, text]) => `${name}: ${text}`)
        : String(value).split("\n");
    tip.replaceChildren(...lines.map((line) => element("div", {}, line)));
    const x = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4);
    const isLow = event.clientY + 12 + tip.offsetHeight > innerHeight;
    const y = isLow ? event.clientY - 12 - tip.offsetHeight : event.clientY + 12;
    tip.style.left = `${Math.max(4, x)}px`;
    tip.style.top = `${Math.max(4, y)}px`;
  }

  // The specification for the dark: the one for the light with some values exchanged.
  function inTheDark({ spec, dark }) {
    const changed = { spec: structuredClone(spec) };
    for (const [path, value] of dark) {
      const keys = ["spec", ...path];
      const last = keys.pop();
      keys.reduce((node, key) => node[key], changed)[last] = value;
    }
    return changed.spec;
  }

  const isDark = matchMedia("(prefers-color-scheme: dark)");

  class Drawing {
    constructor(figure) {
      this.place = figure.querySelector(".drawing");
      this.failed = figure.querySelector(".failed");
      this.data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
      this.view = null;
    }

    async draw() {
      const spec = isDark.matches ? inTheDark(this.data) : structuredClone(this.data.spec);
      try {
        this.view?.finalize();
        const drawn = await window.vegaEmbed(this.place, spec, {
          mode: "vega-lite",
          ast: true, // expressions are interpreted, since eval() is forbidden here
          renderer: "svg",
          actions: false,
          defaultStyle: false,
          tooltip: showTip,
        });
        this.view = drawn.view;
      } catch (error) {
        this.failed.textContent = `The picture could not be drawn: ${error.message}`;
        this.failed.hidden = false;
      }
    }
  }

  let drawings = [];
  let drawing = Promise.resolve();

  // One after the other, and never the same one twice at once.
  function drawAll() {
    drawing = drawing.then(async () => {
      tip.hidden = true;
      document.documentElement.classList.toggle("dark-charts", isDark.matches);
      for (const one of drawings) await one.draw();
    });
  }

  // The library stands behind this script.
  addEventListener("DOMContentLoaded", () => {
    drawings = Array.from(document.querySelectorAll("figure"), (figure) => new Drawing(figure));
    drawAll();
    isDark.addEventListener("change", drawAll);
  });

  // Addresses

  // What stands behind the # of the address; "" where it is no text, as of a lone %.
  function targetId() {
    try {
      return decodeURIComponent(location.hash.slice(1));
    } catch (error) {
      if (error instanceof URIError) return "";
      throw error;
    }
  }

  function openTarget() {
    const target = document.getElementById(targetId());
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.scrollIntoView();
    }
  }
  addEventListener("hashchange", openTarget);
  openTarget(); // last: whatever is in an address, all else works
})();

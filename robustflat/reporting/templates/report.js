"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const rows = JSON.parse(document.getElementById("rows").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const PAPER_WIDTH = 640;
  let tables = [];

  // Libraries are packed with gzip and base64; browsers unpack them without a request.
  async function unpacked(name) {
    const bytes = Uint8Array.from(atob(document.getElementById("library-" + name).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  function scheme(onPaper) {
    return PALETTES[dark.matches && !onPaper ? "dark" : "light"];
  }

  // Copies a description, with the tokens of colours replaced by those of the scheme.
  function coloured(value, colours) {
    if (typeof value === "string") return value[0] === "@" && value.slice(1) in colours ? colours[value.slice(1)] : value;
    if (Array.isArray(value)) return value.map((part) => coloured(part, colours));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, coloured(part, colours)]));
    }
    return value;
  }

  function draw(key, onPaper = false) {
    const box = document.getElementById("chart-" + key);
    const figure = coloured(charts[key], scheme(onPaper));
    (box.data || []).forEach((trace, index) => {
      figure.data[index].visible = trace.visible;
      if ("selectedpoints" in trace) figure.data[index].selectedpoints = trace.selectedpoints;
    });
    if (onPaper) figure.layout.width = Math.min(PAPER_WIDTH, box.clientWidth || PAPER_WIDTH);
    else figure.layout.autosize = true;
    return Plotly.react(box, figure.data, figure.layout, {
      responsive: true,
      displaylogo: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { format: "svg", filename: key },
      scrollZoom: false,
    });
  }

  const breathe = () => new Promise((resolve) => setTimeout(resolve, 0));

  async function drawAll() {
    const code = document.createElement("script");
    code.textContent = await unpacked("plotly");
    document.head.append(code);
    for (const key of Object.keys(charts)) {
      await draw(key);
      await breathe();
    }
  }

  function redrawAll(onPaper = false) {
    root.classList.toggle("dark", dark.matches && !onPaper);
    if (window.Plotly) Object.keys(charts).forEach((key) => draw(key, onPaper));
  }

  async function enrichTables() {
    const style = document.createElement("style");
    style.textContent = await unpacked("style");
    document.head.prepend(style);
    const source = await unpacked("tables");
    const { jQuery } = await import(await dataUrl(source));
    for (const table of document.querySelectorAll("table[data-table]")) {
      const filters = "filters" in table.dataset;
      const data = "deferred" in table.dataset ? rows[table.dataset.table] : undefined;
      const long = (data || table.tBodies[0].rows).length > 10;
      tables.push(
        jQuery(table).DataTable({
          order: [],
          ...(data ? deferred(data, table) : {}),
          autoWidth: false,
          pageLength: 25,
          lengthMenu: [10, 25, 50, 100, { label: "all", value: -1 }],
          paging: long,
          info: long,
          ordering: { indicators: false, handler: false },
          columnControl: [{ target: 0, content: ["order"] }].concat(filters ? [{ target: 1, content: ["search"] }] : []),
          layout: {
            topStart: long ? "pageLength" : null,
            topEnd: filters || long ? "search" : null,
            bottomStart: long ? "info" : null,
            bottomEnd: long ? "paging" : null,
          },
        })
      );
      await breathe();
    }
  }

  // Cells are pairs of what is shown and what is sorted by; they are put in as text, never as HTML.
  function deferred(data, table) {
    const escape = (text) => text.replace(/[&<>"']/g, (sign) => "&#" + sign.charCodeAt(0) + ";");
    return {
      data,
      deferRender: true,
      columns: [...table.tHead.rows[0].cells].map((head, index) => ({
        data: index,
        className: ["number", "sentence"].find((style) => head.classList.contains(style)) || "",
        render: (cell, type) => (type === "display" ? escape(cell[0]) : cell[1]),
      })),
    };
  }

  function dataUrl(source) {
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(new Blob([source], { type: "text/javascript" }));
    });
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".legend button");
    if (!button || !window.Plotly) return;
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    const traces = button.dataset.traces.split(" ").map(Number);
    Plotly.restyle(document.getElementById("chart-" + button.dataset.chart), { visible: shown }, traces);
  });

  const select = document.getElementById("highlight");
  if (select) {
    select.addEventListener("change", () => {
      for (const [key, figure] of Object.entries(charts)) {
        const box = document.getElementById("chart-" + key);
        figure.data.forEach((trace, index) => {
          if (!trace.customdata || !box.data) return;
          const chosen = [...trace.customdata.keys()].filter((i) => trace.customdata[i] === select.value);
          Plotly.restyle(box, { selectedpoints: [select.value ? chosen : null] }, [index]);
        });
      }
    });
  }

  dark.addEventListener("change", () => redrawAll());
  addEventListener("beforeprint", () => {
    tables.filter((table) => table.rows().count() <= 500).forEach((table) => table.page.len(-1).draw());
    redrawAll(true);
  });
  addEventListener("afterprint", () => {
    tables.forEach((table) => table.page.len(25).draw());
    redrawAll();
  });

  root.classList.toggle("dark", dark.matches);
  enrichTables()
    .then(drawAll)
    .then(() => {
      root.dataset.ready = "true";
    })
    .catch((error) => {
      const trouble = document.getElementById("trouble");
      trouble.textContent =
        "The figures could not be drawn (" + error + "). They need a browser of 2023 or later; " +
        "static figures lie in the folder figures beside this page.";
      trouble.hidden = false;
      console.error(error);
    });
})();

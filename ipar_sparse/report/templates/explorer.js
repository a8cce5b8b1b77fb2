// Fills the Bokeh maps of this page with cells, and connects them with the page's choices.
(async () => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const page = JSON.parse(byId("explorer-data").textContent);
  const inflate = async (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  };
  const element = (tag, text, properties = {}) =>
    Object.assign(document.createElement(tag), { textContent: text ?? "" }, properties);
  const format = (value) =>
    Number.isNaN(value) ? "none" : Number(value.toPrecision(4)).toLocaleString("en", { useGrouping: Math.abs(value) >= 1e5, maximumFractionDigits: 6 });

  // A column's values, NaN where there is none: numbers, or places among its labels or colours.
  const decode = async (column) => {
    if (column.values) return column;
    const buffer = await inflate(column.data);
    const codes = column.type === "u1" ? new Uint8Array(buffer) : new Uint16Array(buffer);
    const none = column.type === "u1" ? 255 : 65535;
    const step = column.kind === "numbers" ? (column.high - column.low) / (none - 1) : 1;
    const low = column.kind === "numbers" ? column.low : 0;
    column.values = Float32Array.from(codes, (code) =>
      code === none && column.kind !== "place" ? NaN : low + step * code);
    column.text = (cell) => {
      const value = column.values[cell];
      return column.kind === "numbers" ? format(value) : (column.labels?.[value] ?? "none");
    };
    return column;
  };

  byId("explorer").hidden = false;
  const key = { docid: "page", roots: page.roots, root_ids: Object.keys(page.roots) };
  const [views] = await Bokeh.embed.embed_items({ page: page.document }, [key]);
  const plots = key.root_ids.map((id) => views.get_by_id(id));
  const model = (name) => plots[0].model.document.get_model_by_name(name);
  const source = model("cells");
  const names = JSON.parse(new TextDecoder().decode(await inflate(page.names)));
  const title = (map) => byId(`map-${map}`).dataset.title;
  const layouts = {};
  for (const [name, text] of Object.entries(page.layouts)) layouts[name] = new Float32Array(await inflate(text));
  source.data = Object.fromEntries(plots.flatMap((_, map) => [
    [`x${map}`, layouts[title(map)].subarray(0, page.count)],
    [`y${map}`, layouts[title(map)].subarray(page.count)],
    [`color${map}`, new Float32Array(page.count)],
  ]));

  // What the tooltip names beside the colour: the first labels, and what is known of a cell's error.
  const told = page.columns.filter((one, place) =>
    one.name.startsWith("ipar_") || page.columns.findIndex((other) => other.kind === "labels") === place);
  await Promise.all(told.map(decode));
  const tooltip = (map) => (_, { index }) => {
    const box = element("div");
    box.append(element("b", names[index]));
    for (const column of new Set([chosen[map], ...told])) {
      if (column.kind !== "place") box.append(element("div", `${column.name}: ${column.text(index)}`));
    }
    return box;
  };

  const chosen = [];
  const select = (cells) => { source.selected.indices = cells; };
  const drawLegend = (legend, column) => {
    legend.replaceChildren();
    if (column.kind === "numbers") {
      const [low, high] = column.shown.map(format);
      legend.append(element("span", low), element("i", "", { className: "ramp" }), element("span", high));
    } else if (column.kind === "labels") {
      const counts = new Uint32Array(column.labels.length);
      for (const value of column.values) if (!Number.isNaN(value)) counts[value] += 1;
      column.labels.forEach((label, place) => {
        if (!counts[place]) return;
        const entry = element("button", "", { type: "button", title: "select these cells" });
        const dot = element("i");
        dot.style.background = column.colors[place];
        entry.append(dot, element("span", label), element("small", counts[place].toLocaleString("en")));
        entry.onclick = () => select([...column.values.keys()].filter((cell) => column.values[cell] === place));
        legend.append(entry);
      });
    } else {
      legend.append(element("span", "A cell has the colour of its place on this map: blue to orange from left to right, dark to light upwards."));
    }
  };
  const colorBy = async (choice) => {
    const column = await decode(page.columns[choice.value]);
    for (const map of choice.dataset.maps.split(" ")) {
      chosen[map] = column;
      const [low, high] = column.kind === "numbers" ? column.shown : [-0.5, column.colors.length - 0.5];
      model(`colors${map}`).setv({ palette: column.colors ?? page.ramp, low, high: high > low ? high : low + 1 });
      source.data[`color${map}`] = column.values;
      byId(`map-${map}`).setAttribute("aria-label", `${title(map)}: map of ${page.count} cells, coloured by ${column.name}`);
    }
    source.change.emit();
    drawLegend(byId(`legend-${choice.id}`), column);
  };
  const choices = [...document.querySelectorAll("#explorer select")];
  for (const choice of choices) {
    choice.onchange = () => colorBy(choice);
    await colorBy(choice);
  }
  plots.forEach((_, map) => { model(`hover${map}`).tooltips = tooltip(map); });

  // Dots grow as one zooms in, though less than the distances between them.
  const range = plots[0].model.x_range;
  const glyphs = plots.map((_, map) => model(`glyphs${map}`));
  const size = glyphs[0].glyph.size.value ?? glyphs[0].glyph.size;
  let whole = null;
  range.change.connect(() => {
    const span = Math.abs(range.end - range.start);
    if (!(span > 0)) return;
    whole = Math.max(whole ?? span, span);
    const factor = Math.min(6, Math.sqrt(whole / span));
    for (const renderer of glyphs) renderer.glyph.size = { value: size * factor };
  });

  const status = byId("selected");
  const onSelection = () => {
    const count = source.selected.indices.length;
    status.textContent = count
      ? `${count.toLocaleString("en")} of ${page.count.toLocaleString("en")} cells are selected; downloads hold these.`
      : "No cell is selected; downloads hold all.";
    byId("clear").disabled = !count;
  };
  source.selected.properties.indices.change.connect(onSelection);
  onSelection();
  byId("clear").onclick = () => select([]);

  const save = (name, content, type) => {
    const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
    const link = element("a", "", { href: url, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  };
  const toCsv = (rows) => rows.map((row) => row.map((value) =>
    /[",\n\r]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value).join(",")).join("\n") + "\n";
  const inFileOrder = () => {
    const order = new Array(page.count);
    for (let cell = 0; cell < page.count; cell += 1) order[(cell * page.stride) % page.count] = cell;
    const picked = new Set(source.selected.indices);
    return picked.size ? order.filter((cell) => picked.has(cell)) : order;
  };
  const digits = (value) => Number(value.toPrecision(7));
  const coordinates = () => [
    ["cell", ...Object.keys(layouts).flatMap((name) => [`${name.toLowerCase()}_x`, `${name.toLowerCase()}_y`])],
    (cell) => [names[cell], ...Object.values(layouts).flatMap((one) => [one[cell], one[page.count + cell]].map(digits))],
  ];
  byId("save-coordinates").onclick = () => {
    const [head, row] = coordinates();
    save("coordinates.csv", toCsv([head, ...inFileOrder().map(row)]), "text/csv");
  };
  byId("save-table").onclick = async () => {
    const [head, row] = coordinates();
    const columns = await Promise.all(page.columns.filter((one) => one.kind !== "place").map(decode));
    const value = (column, cell) => {
      const known = column.values[cell];
      if (Number.isNaN(known)) return "";
      return column.labels ? column.labels[known] : digits(known);
    };
    const rows = inFileOrder().map((cell) => [...row(cell), ...columns.map((one) => value(one, cell))]);
    save("cells.csv", toCsv([[...head, ...columns.map((one) => one.name)], ...rows]), "text/csv");
  };
  for (const button of document.querySelectorAll("button[data-table]")) {
    const text = (cell) => cell.firstChild.textContent.trim();
    const rows = [...byId(button.dataset.table).rows].map((row) => [...row.cells].map(text));
    button.hidden = false;
    button.onclick = () => save("scores.csv", toCsv(rows), "text/csv");
  }
  byId("save-figure").onclick = () => {
    const parts = plots.map((plot) => plot.export("png", true).canvas);
    const scale = parts[0].width / plots[0].bbox.width;
    const lines = Math.max(1, ...chosen.map((one) => Math.ceil((one.labels?.length ?? 1) / 3)));
    const canvas = element("canvas", "", {
      width: parts.reduce((sum, one) => sum + one.width, 0),
      height: parts[0].height + scale * (60 + 18 * lines),
    });
    const pen = canvas.getContext("2d");
    pen.fillStyle = "white";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.scale(scale, scale);
    let left = 0;
    parts.forEach((part, map) => {
      const [width, height, column] = [part.width / scale, part.height / scale, chosen[map]];
      pen.drawImage(part, left, 30, width, height);
      const write = (text, x, y) => { pen.fillStyle = "#1f2933"; pen.fillText(text, x, y, width / 3); };
      pen.font = "13px sans-serif";
      pen.fillStyle = "#1f2933";
      pen.fillText(`${title(map)}, ${column.name}`, left + 8, 20, width - 16);
      pen.font = "11px sans-serif";
      const top = height + 52;
      (column.labels ?? []).forEach((label, place) => {
        const [x, y] = [left + 8 + (place % 3) * (width / 3), top + 18 * Math.floor(place / 3)];
        pen.fillStyle = column.colors[place];
        pen.fillRect(x, y - 9, 10, 10);
        write(label, x + 14, y);
      });
      if (column.kind === "numbers") {
        const ramp = page.ramp;
        ramp.forEach((color, step) => { pen.fillStyle = color; pen.fillRect(left + 60 + step * 0.6, top - 9, 1, 10); });
        write(format(column.shown[0]), left + 8, top);
        write(format(column.shown[1]), left + 60 + 0.6 * ramp.length + 6, top);
      }
      left += width;
    });
    canvas.toBlob((blob) => save("map.png", blob), "image/png");
  };
  byId("map-figures").hidden = true;
  document.documentElement.dataset.explorer = "ready";
})().catch((error) => {
  document.getElementById("explorer").hidden = true;
  document.getElementById("explorer-failed").hidden = false;
  console.error(error);
});

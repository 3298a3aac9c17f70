"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const token = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // Theme: the system's, until the reader chooses; the figures follow the page.
  const stored = { get() { try { return localStorage.getItem("sae-bias-theme"); } catch { return null; } },
                   set(v) { try { localStorage.setItem("sae-bias-theme", v); } catch { /* private window */ } } };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const button = document.getElementById("theme");
  function label() {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Switch to light colors" : "Switch to dark colors");
    button.setAttribute("aria-pressed", String(isDark()));
  }
  const chosen = stored.get();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  label();

  // Figures
  const plots = [...document.querySelectorAll(".plot")];
  const file = (div) => "sae-bias-" + div.id.replace(/-plot$/, "");
  function paint(layout) {
    const ink = token("--soft"), line = token("--grid"), card = token("--card");
    layout.font = { ...(layout.font || {}), color: ink };
    layout.paper_bgcolor = card;
    layout.plot_bgcolor = card;
    layout.hoverlabel = { ...(layout.hoverlabel || {}), bgcolor: card, bordercolor: line, font: { color: token("--ink"), size: 13 } };
    for (const key of Object.keys(layout).filter((k) => /^[xy]axis/.test(k))) layout[key] = { ...layout[key], gridcolor: line, linecolor: line };
    return layout;
  }
  const narrow = (div) => div.clientWidth < 520;
  const inked = (trace, div) => (trace.type === "heatmap" ? { ...trace, texttemplate: narrow(div) ? "" : trace.texttemplate, textfont: { color: token("--ink"), size: 12 } } : trace);
  // A phone has no room for long row labels or a tool bar: labels are cut (hovering shows them in full), the bar is left out.
  const bare = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  const safe = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const short = (line) => (line.startsWith("<") || bare(line).length <= 18 ? line : safe(bare(line).slice(0, 17)) + "…");
  const cut = (text) => String(text).split("<br>").map(short).join("<br>");
  const wrap = (text) => String(text).replace(/(.{24,}?)\s+/g, "$1<br>");
  function fit(layout, div) {
    if (!narrow(div)) return layout;
    layout.margin = { ...layout.margin, l: 8, r: 12 };
    layout.font = { ...layout.font, size: 11 };
    for (const key of Object.keys(layout).filter((k) => /^xaxis/.test(k))) if (layout[key].title?.text) layout[key] = { ...layout[key], title: { ...layout[key].title, text: wrap(layout[key].title.text) } };
    for (const key of Object.keys(layout).filter((k) => /^yaxis/.test(k))) if (layout[key].ticktext) layout[key] = { ...layout[key], ticktext: layout[key].ticktext.map(cut) };
    return layout;
  }
  function config(div) {
    return { responsive: true, displaylogo: false, displayModeBar: narrow(div) ? false : "hover", showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
             toImageButtonOptions: { format: "svg", filename: file(div) } };
  }
  const read = (div) => JSON.parse(document.querySelector(`script[data-figure="${div.id}"]`).textContent);
  async function draw(div) {
    const figure = read(div);
    await Plotly.react(div, figure.data.map((trace) => inked(trace, div)), fit(paint(figure.layout), div), config(div));
    div.dataset.drawn = "true";
  }
  for (const div of plots) div.style.height = `${div.dataset.height || 420}px`;
  async function drawAll() {
    root.dataset.drawn = "";
    for (const div of plots) {
      await draw(div);
      await new Promise((next) => setTimeout(next, 0));
    }
    root.dataset.drawn = "true";
  }
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored.set(root.dataset.theme);
    label();
    drawAll();
  });
  dark.addEventListener("change", () => { label(); drawAll(); });
  document.addEventListener("click", (event) => {
    const save = event.target.closest("[data-save]");
    if (!save) return;
    const div = document.getElementById(save.dataset.plot);
    Plotly.downloadImage(div, { format: save.dataset.save, filename: file(div), width: div.clientWidth, height: div.clientHeight, scale: save.dataset.save === "png" ? 2 : 1 });
  });

  // Tables: a heading sorts, a second press turns the order round, what has no value stays last.
  const key = (cell) => (cell.hasAttribute("data-none") ? null : (cell.dataset.v ?? cell.textContent));
  function sort(th) {
    const table = th.closest("table"), body = table.tBodies[0], column = th.cellIndex, numeric = th.dataset.kind === "num";
    const first = numeric ? "descending" : "ascending", other = numeric ? "ascending" : "descending";
    const order = th.getAttribute("aria-sort") === first ? other : first, sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].map((row) => ({ row, value: key(row.cells[column]) }));
    const compare = numeric ? (a, b) => Number(a) - Number(b) : new Intl.Collator("en", { numeric: true }).compare;
    rows.sort((a, b) => (a.value === null ? (b.value === null ? 0 : 1) : b.value === null ? -1 : sign * compare(a.value, b.value)));
    for (const head of th.parentElement.cells) head.setAttribute("aria-sort", head === th ? order : "none");
    body.append(...rows.map((r) => r.row));
    show(table);
  }
  document.addEventListener("click", (event) => { const th = event.target.closest("table.sortable th"); if (th) sort(th); });

  // A long table lays out its first rows only, until all are asked for; a filter looks through all of them.
  const FIRST = 200;
  function show(table) {
    const tools = document.querySelector(`[data-tools="${table.id}"]`), wanted = (tools.querySelector("input")?.value || "").trim().toLowerCase();
    let found = 0, shown = 0;
    for (const row of table.tBodies[0].rows) {
      row.text ??= row.textContent.toLowerCase();
      const match = wanted === "" || row.text.includes(wanted), hide = !match || (found >= FIRST && !table.dataset.all);
      found += match;
      shown += !hide;
      if (row.hidden !== hide) row.hidden = hide;
    }
    const count = tools.querySelector(".count"), total = table.tBodies[0].rows.length;
    count.dataset.whole ??= count.textContent;
    const part = shown < found ? `first ${shown} of ${found.toLocaleString("en")} rows` : `${found.toLocaleString("en")} of ${total.toLocaleString("en")} rows`;
    count.textContent = shown === total ? count.dataset.whole : part + count.dataset.whole.replace(/^[\d,]+ rows/, "");
    const more = tools.querySelector("[data-all]");
    if (more) more.hidden = shown === found;
  }
  for (const table of document.querySelectorAll("table.sortable")) show(table);
  document.addEventListener("input", (event) => { const id = event.target.dataset?.filter; if (id) show(document.getElementById(id)); });
  document.addEventListener("click", (event) => {
    const table = event.target.dataset?.all && document.getElementById(event.target.dataset.all);
    if (table) { table.dataset.all = "true"; show(table); }
  });

  // Deep links: open what is folded around the target; the list of sections shows where one is.
  function open() {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let box = target && target.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    return target;
  }
  addEventListener("hashchange", open);
  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      for (const a of links.values()) a.removeAttribute("aria-current");
      links.get(target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  for (const id of links.keys()) { const section = document.getElementById(id); if (section) watch.observe(section); }
  drawAll().then(() => { const target = open(); if (target) target.scrollIntoView(); });
})();

// Sorting, a filter and copies for every table; without it the page is whole, but still.
const escapes = {
  Markdown: text => text.replace(/\|/g, "\\|"),
  CSV: text => /[",]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text,
  LaTeX: text => text.replace(/[&%$#_{}]/g, "\\$&"),
};
const writers = {
  Markdown: ([head, ...rows]) => [head, head.map(() => "---"), ...rows].map(row => `| ${row.join(" | ")} |`),
  CSV: rows => rows.map(row => row.join(",")),
  LaTeX: ([head, ...rows]) => [`\\begin{tabular}{l${"r".repeat(head.length - 1)}}`, "\\toprule", `${head.join(" & ")} \\\\`,
    "\\midrule", ...rows.map(row => `${row.join(" & ")} \\\\`), "\\bottomrule", "\\end{tabular}"],
};
const text = element => element ? element.innerText.replace(/\s+/g, " ").trim() : "";

// A cell's value, interval and published figure are columns of their own, where any row has them.
function split(cell) {
  const parts = [".interval", ".published"].map(name => text(cell.querySelector(name)));
  return [parts.reduce((rest, part) => rest.replace(part, ""), text(cell)).trim(), ...parts];
}
function grid(table) {
  const rows = [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => [...row.cells].map(split));
  const head = [...table.tHead.rows[0].cells].map(cell => [text(cell), "interval", "published"]);
  const used = head.map((_, i) => [0, 1, 2].filter(k => !k || rows.some(row => row[i][k])));
  return [head, ...rows].map(row => row.flatMap((cell, i) => used[i].map(k => cell[k])));
}
function copy(table, kind, button) {
  const area = document.createElement("textarea");
  area.value = writers[kind](grid(table).map(row => row.map(escapes[kind]))).join("\n") + "\n";
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  button.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => button.textContent = `Copy ${kind}`, 1500);
}
function sort(table, index) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const down = heads[index].getAttribute("aria-sort") === "descending" ? 1 : -1;
  heads.forEach(head => head.removeAttribute("aria-sort"));
  heads[index].setAttribute("aria-sort", down < 0 ? "descending" : "ascending");
  const key = row => index ? parseFloat(text(row.cells[index])) : NaN;
  const order = (a, b) => isNaN(key(a)) - isNaN(key(b)) || down * (key(a) - key(b))
    || -down * text(a.cells[index]).localeCompare(text(b.cells[index]));
  body.append(...[...body.rows].sort(order));
}
function add(parent, tag, properties) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}
for (const table of document.querySelectorAll(".scroll > table")) {
  const tools = document.createElement("div");
  tools.className = "tools";
  table.parentElement.before(tools);
  const shown = wanted => [...table.tBodies[0].rows].forEach(row => row.hidden = !text(row).toLowerCase().includes(wanted));
  const filter = add(tools, "input", { type: "search", placeholder: "Filter rows", oninput: () => shown(filter.value.toLowerCase()) });
  filter.setAttribute("aria-label", "Filter rows");
  for (const kind in writers)
    add(tools, "button", { type: "button", textContent: `Copy ${kind}`, onclick: event => copy(table, kind, event.target) });
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.onclick = () => sort(table, index);
    head.append(button);
  });
}
document.querySelectorAll("nav details a").forEach(a => a.onclick = () => a.closest("details").open = false);

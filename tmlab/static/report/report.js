// Draws the figures (their JSON stands in the page), follows light and dark, and opens all code at once. Needs nothing from the network.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const figures = [...document.querySelectorAll(".plot")];
  const ink = () => (dark.matches ? "#c9d1d9" : "#30363d");
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

  function draw(el) {
    const fig = JSON.parse(document.getElementById(el.id + "-data").textContent);
    const layout = fig.layout ?? {};
    el.dataset.ownFont = String(Boolean(layout.font?.color));
    layout.font = { ...layout.font, color: layout.font?.color ?? ink() };
    const narrow = el.clientWidth < 560;
    if (narrow && Object.keys(layout).some((k) => /^[xy]axis\d/.test(k))) el.style.minWidth = "620px";  // panels side by side scroll
    else if (narrow) {  // a phone: the legend below, small margins
      layout.legend = { ...layout.legend, orientation: "h", x: 0, xanchor: "left", y: -0.22, yanchor: "top" };
      layout.margin = { l: 48, r: 10, t: 40, b: 40, ...layout.margin };
    }
    return Plotly.newPlot(el, fig.data, layout, { ...config, displayModeBar: narrow ? false : "hover" }).then(() => {
      if (fig.frames?.length) Plotly.addFrames(el, fig.frames);
      el.dataset.drawn = "true";
    });
  }
  const recolour = (colour) => figures.forEach((el) => el.dataset.drawn && el.dataset.ownFont !== "true" && Plotly.relayout(el, { "font.color": colour }));

  document.addEventListener("DOMContentLoaded", () => {
    if (figures.length && !window.Plotly) {
      figures.forEach((el) => { el.innerHTML = '<p class="note">This figure needs plotly.min.js, which lies in the folder "assets" beside the reports. Keep that folder with the page.</p>'; });
      return;
    }
    figures.forEach(draw);
    dark.addEventListener("change", () => recolour(ink()));
    window.addEventListener("beforeprint", () => recolour("#1b1f24"));
    window.addEventListener("afterprint", () => recolour(ink()));
  });

  const toggle = document.getElementById("show-code");
  toggle?.addEventListener("change", () => document.querySelectorAll("details.code").forEach((d) => { d.open = toggle.checked; }));
})();

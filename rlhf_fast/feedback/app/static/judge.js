// Keys, drafts and time of the judging page; without it the form still works.
(() => {
  const form = document.getElementById("judgement");
  if (!form) return;
  const status = document.getElementById("status");
  const before = Number(form.elements.seconds.dataset.before) || 0;
  let spent = 0, since = performance.now(), waiting = 0;
  const seconds = () => before + (spent + (document.hidden ? 0 : performance.now() - since)) / 1000;
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { spent += performance.now() - since; save(); } else since = performance.now();
  });
  const save = async () => {
    clearTimeout(waiting);
    form.elements.seconds.value = seconds().toFixed(1);
    try {
      const answer = await fetch("/draft", {method: "POST", body: new URLSearchParams(new FormData(form)), keepalive: true});
      status.textContent = answer.ok ? status.dataset.saved : status.dataset.notSaved;
    } catch { status.textContent = status.dataset.notSaved; }
  };
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(save, 400); });
  form.addEventListener("submit", () => { clearTimeout(waiting); form.elements.seconds.value = seconds().toFixed(1); });
  // Enter is to save once the item is shown, and not to hide it again.
  document.querySelector(".hidden-item")?.addEventListener("toggle", event => { if (event.target.open) document.activeElement.blur(); });
  document.addEventListener("keydown", event => {
    if (event.altKey || event.metaKey || event.repeat) return;
    const writes = event.target.matches("textarea, select, input:not([type=radio])");
    if (event.ctrlKey ? event.key !== "Enter" : writes) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "Enter" && event.target.matches("button, a, summary")) return;
    const at = document.querySelector('[data-key="' + CSS.escape(event.key.length === 1 ? event.key.toLowerCase() : event.key) + '"]');
    // What a content warning hides is not answered by a key either; the summary itself is the button that shows it.
    if (!at || (!at.matches("summary") && at.closest("details:not([open])"))) return;
    event.preventDefault();
    if (at.matches("textarea, input:not([type=radio])")) at.focus();
    else {
      at.click();
      const next = at.matches("summary") && at.parentElement.open ? at.parentElement.querySelector("input[type=radio]") : at;
      if (next.type === "radio" && !at.closest(".hidden-item > summary")) next.focus();
    }
  });
})();

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
  document.addEventListener("keydown", event => {
    if (event.altKey || event.metaKey || event.repeat) return;
    const writes = event.target.matches("textarea, select, input:not([type=radio])");
    if (event.ctrlKey ? event.key !== "Enter" : writes) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "Enter" && event.target.matches("button, a, summary")) return;
    const at = document.querySelector('[data-key="' + CSS.escape(event.key.length === 1 ? event.key.toLowerCase() : event.key) + '"]');
    if (!at) return;
    event.preventDefault();
    if (at.matches("textarea")) at.focus();
    else { at.click(); if (at.type === "radio") at.focus(); }
  });
})();

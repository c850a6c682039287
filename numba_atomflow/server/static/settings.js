// System prompt, sampling options and theme, kept in the browser; the API key until the tab is closed.

const DEFAULTS = {
  system: "",
  temperature: 0.7,
  top_p: 0.95,
  top_k: 0,
  min_p: 0,
  repetition_penalty: 1,
  max_tokens: 1024,
  seed: "",
};
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const STORED = "numba-atomflow settings";
const KEY = "numba-atomflow api key";
const THEME = "numba-atomflow theme";

const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");

let settings = { ...DEFAULTS, ...stored() };

function stored() {
  try {
    const values = JSON.parse(localStorage.getItem(STORED) ?? "{}");
    return Object.fromEntries(Object.entries(values).filter(([name]) => name in DEFAULTS));
  } catch {
    return {}; // damaged, or storage is turned off
  }
}

function store(storage, name, value) {
  try {
    storage.setItem(name, value);
  } catch {
    // storage is turned off: the value lasts as long as the page
  }
}

let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  key = "";
}

export function apiKey() {
  return key;
}

export function systemPrompt() {
  return settings.system;
}

/** The sampling options as fields of a request. */
export function samplingFields() {
  return Object.fromEntries(NUMBERS.filter((name) => settings[name] !== "").map((name) => [name, settings[name]]));
}

function fill(values) {
  for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
}

/** Set up the dialog. @param {() => void} changed called when it is closed. */
export function setUpSettings(changed) {
  document.getElementById("open-settings").addEventListener("click", () => {
    fill({ ...settings, api_key: key });
    dialog.showModal();
  });
  document.getElementById("reset-settings").addEventListener("click", () => fill(DEFAULTS));
  form.addEventListener("submit", () => {
    settings = { ...DEFAULTS, system: form.elements.system.value };
    for (const name of NUMBERS) {
      const { value, valueAsNumber } = form.elements[name];
      if (value !== "") settings[name] = valueAsNumber;
    }
    key = form.elements.api_key.value.trim();
    store(localStorage, STORED, JSON.stringify(settings));
    store(sessionStorage, KEY, key);
    changed();
  });
}

// --- theme ---

const THEMES = ["auto", "light", "dark"];
let theme = "auto";
try {
  theme = THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto";
} catch {
  theme = "auto";
}

function showTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" }[theme];
  button.title = "Theme: as the system, light or dark";
}

export function setUpTheme() {
  showTheme();
  document.getElementById("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    store(localStorage, THEME, theme);
    showTheme();
  });
}

// Form fields for options, made from the JSON Schema that the server gives for them.

import { make } from "./dom.js";

const SHOWN_ELSEWHERE = ["preset", "resolution", "device", "normals"];

/** Fields for all options of a schema but those that stand elsewhere on the page. */
export function fieldsOf(schema, prefix, { skip = SHOWN_ELSEWHERE } = {}) {
  return Object.entries(schema.properties).filter(([name]) => !skip.includes(name)).map(([name, about]) => {
    const title = name.replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase());
    const input = Object.assign(inputOf(about), { id: `${prefix}-${name}`, name });
    const row = make("div", { className: "option" }, make("label", { htmlFor: input.id }, title), input);
    if (about.description) {
      const note = make("p", { className: "note", id: `${input.id}-note` }, about.description);
      input.setAttribute("aria-describedby", note.id);
      row.append(note);
    }
    return row;
  });
}

function inputOf(about) {
  const kinds = about.anyOf ?? [about];
  const kind = kinds.find((option) => option.type !== "null");
  if (kind.enum) {
    const select = make("select", {}, ...kind.enum.map((value) => make("option", { value }, value)));
    select.value = select.dataset.default = about.default;
    return select;
  }
  const input = make("input");
  input.dataset.type = kind.type;
  if (kind.type === "boolean") {
    input.type = "checkbox";
    input.checked = Boolean(about.default);
  } else if (kind.type === "array") {
    input.type = "text";
    input.placeholder = "x, y, z";
  } else {
    input.type = "number";
    input.step = kind.type === "integer" ? "1" : "any";
    if (kind.minimum !== undefined) input.min = kind.minimum;
    if (kind.maximum !== undefined && kind.maximum < 2 ** 31) input.max = kind.maximum;
    if (about.default !== null && about.default !== undefined) input.placeholder = about.default;
  }
  return input;
}

/** What has been filled in, by name; what has not is left to the server. */
export function valuesOf(container) {
  const values = {};
  for (const input of container.querySelectorAll("input[name], select[name]")) {
    if (input.tagName === "SELECT") {
      if (input.value !== input.dataset.default) values[input.name] = input.value;
    } else if (input.type === "checkbox") {
      if (input.checked) values[input.name] = true;
    } else if (input.value.trim() !== "") {
      values[input.name] = input.dataset.type === "array"
        ? input.value.split(/[\s,]+/).filter(Boolean).map(Number) : Number(input.value);
    }
  }
  return values;
}

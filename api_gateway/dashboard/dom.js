// Elements are made here and nowhere else. Text is always a text node, so what clients and upstreams send is inert.

const SVG = "http://www.w3.org/2000/svg";
// Control characters, and those that change the direction of text: shown as escapes, as they could hide something.
const UNPRINTABLE = /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** Return a text with unprintable characters as escapes, such as \x1b. */
export function printable(text) {
  return String(text).replace(UNPRINTABLE, (character) => {
    const code = character.charCodeAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

/** Return an element. Properties: `on…` are listeners, `class`, `style` (an object), others are attributes. */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** Return an element of SVG. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [property, one] of Object.entries(value)) element.style.setProperty(property, one);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : printable(value));
  }
  element.append(...nodes(children));
  return element;
}

function nodes(children) {
  return children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false)
    .map((one) => (one instanceof Node ? one : document.createTextNode(printable(one))));
}

/** Replace what is inside an element. */
export function put(element, ...children) {
  element.replaceChildren(...nodes(children));
  return element;
}

/** Set the text of an element if it differs. */
export function say(element, text) {
  const shown = printable(text);
  if (element.textContent !== shown) element.textContent = shown;
  return element;
}

/** Return a word with the shape of its kind: ok, warn, fail or none. */
export function badge(kind, word) {
  return h("span", { class: `badge ${kind}` }, word);
}

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
  lists.delete(element);
  element.replaceChildren(...nodes(children));
  return element;
}

const lists = new WeakMap(); // by element: what `list` has put into it, by key
const CONTROLS = "a, button, input, select, textarea, summary, [tabindex]";

/** Show what `make` returns for each item, in their order. What shows an item that has not changed stays in the page,
 * with its focus, selection and disclosures; what shows one that has changed takes the focus and open disclosures over.
 * `keyOf` identifies an item; an item is what JSON has of it. */
export function list(element, items, keyOf, make) {
  const before = lists.get(element) ?? new Map(), after = new Map(), focused = document.activeElement;
  let heir = focused;
  for (const item of items) {
    let key = String(keyOf(item));
    while (after.has(key)) key += "+";
    const text = JSON.stringify(item), old = before.get(key);
    if (old?.text === text) { after.set(key, old); continue; }
    const one = { text, nodes: nodes([make(item)]) };
    after.set(key, one);
    if (old) heir = successor(old.nodes, one.nodes, focused) ?? heir;
  }
  arrange(element, [...after.values()].flatMap((one) => one.nodes), heir);
  lists.set(element, after);
}

/** Put nodes into an element in this order, and remove all others. The focus stays, on `focused` if it was inside: a
 * node that is moved would lose it. If there is no such control any more, the next element around gets the focus. */
export function arrange(element, wanted, focused = document.activeElement) {
  const had = element.contains(document.activeElement), kept = new Set(wanted);
  for (const one of [...element.childNodes]) if (!kept.has(one)) one.remove();
  let next = element.firstChild;
  for (const one of wanted) {
    if (one === next) next = next.nextSibling;
    else element.insertBefore(one, next);
  }
  if (!had || document.activeElement === focused) return;
  focused.focus({ preventScroll: true });
  if (document.activeElement !== focused) element.closest("[tabindex]")?.focus({ preventScroll: true });
}

/** Open the disclosures that were open; return the control in the place of the focused one. */
function successor(old, made, focused) {
  const all = (found, selector) => found.filter((one) => one instanceof Element).flatMap((one) => [...(one.matches(selector) ? [one] : []), ...one.querySelectorAll(selector)]);
  const disclosures = all(made, "details");
  all(old, "details").forEach((one, index) => { if (one.open && disclosures[index]) disclosures[index].open = true; });
  const before = all(old, CONTROLS), after = all(made, CONTROLS), place = before.indexOf(focused);
  if (place < 0) return null;
  return after.find((one) => one.tagName === focused.tagName && one.textContent === focused.textContent) ?? (before.length === after.length ? after[place] : null);
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

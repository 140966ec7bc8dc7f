// Contrast (WCAG 2) of every visible text on the page with what lies behind it, plots included.
() => {
  const parse = (text) => {
    const numbers = text.match(/[\d.]+/g).map(Number);
    return text.startsWith("color(srgb") ? [...numbers.slice(0, 3).map((part) => part * 255), numbers[3] ?? 1]
      : [...numbers.slice(0, 3), numbers[3] ?? 1];
  };
  const over = (top, below) => [...[0, 1, 2].map((n) => top[n] * top[3] + below[n] * (1 - top[3])), 1];
  const behind = (node) => {
    if (!node) return [255, 255, 255, 1];
    const own = parse(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own : over(own, behind(node.parentElement));
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((part) => (part /= 255) <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const out = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || node.closest("script, style, .hm, .skip, [aria-hidden]") || !node.checkVisibility()) continue;
    const style = getComputedStyle(node), ground = behind(node);
    const svg = node.namespaceURI.endsWith("svg");
    const ink = over(parse(svg ? style.fill : style.color), ground);
    const [high, low] = [light(ink.slice(0, 3)), light(ground.slice(0, 3))].sort((a, b) => b - a);
    if (svg && node.closest(".heatmaplayer")) continue;  // on fields, whose colour is in an image
    out.push({ text: walker.currentNode.data.trim().slice(0, 40), ratio: (high + 0.05) / (low + 0.05), where: node.className?.baseVal ?? node.className });
  }
  return out;
}

// Markdown of a reply as DOM nodes. Every text becomes a text node: nothing that a model writes is parsed as HTML.
// Links and images stay text, so that a reply cannot make the browser fetch or offer anything.

/** The blocks of a text: objects with `type` and what that type needs. */
export function parseBlocks(text) {
  const blocks = [];
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const fence = line.match(/^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)/);
    if (fence) {
      const end = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      const code = [];
      for (i += 1; i < lines.length && !end.test(lines[i]); i += 1) code.push(lines[i]);
      i += 1; // the closing fence, if the text goes on to it
      blocks.push({ type: "code", language: fence[2], text: code.join("\n") });
      continue;
    }
    const heading = line.match(/^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/);
    if (heading) {
      blocks.push({ type: "heading", level: heading[1].length, text: heading[2] });
      i += 1;
    } else if (/^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      blocks.push({ type: "rule" });
      i += 1;
    } else if (ITEM.test(line)) {
      const ordered = /^\s*\d/.test(line);
      const list = { type: "list", ordered, start: ordered ? parseInt(line, 10) : 1, items: [] };
      for (; i < lines.length && lines[i].trim() && !isOther(lines[i]); i += 1) {
        const item = lines[i].match(ITEM);
        if (item && item[2] !== undefined) list.items.push({ depth: Math.floor(item[1].length / 2), text: item[2] });
        else list.items.at(-1).text += `\n${lines[i].trim()}`;
      }
      blocks.push(list);
    } else if (/^ {0,3}>/.test(line)) {
      const quoted = [];
      for (; i < lines.length && /^ {0,3}>/.test(lines[i]); i += 1) quoted.push(lines[i].replace(/^ {0,3}> ?/, ""));
      blocks.push({ type: "quote", text: quoted.join("\n") });
    } else if (line.trim()) {
      const paragraph = [];
      for (; i < lines.length && lines[i].trim() && !isOther(lines[i]) && !ITEM.test(lines[i]); i += 1)
        paragraph.push(lines[i]);
      blocks.push({ type: "paragraph", text: paragraph.join("\n") });
    } else i += 1;
  }
  return blocks;
}

const ITEM = /^(\s*)(?:[-*+]|\d{1,9}[.)])\s+(.*)$/;

/** Whether a line begins a block that ends a paragraph or a list. */
function isOther(line) {
  return /^ {0,3}(`{3,}|~{3,}|#{1,6}\s|>)/.test(line);
}

/** Show blocks in a container; those that are there already stay, so that a selection in them survives. */
export function showBlocks(container, blocks) {
  const shown = container.shownBlocks ?? [];
  const keys = blocks.map((block) => JSON.stringify(block));
  let same = 0;
  while (same < keys.length && keys[same] === shown[same]) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(blockNode(block));
  container.shownBlocks = keys;
}

function blockNode(block) {
  if (block.type === "code") return codeNode(block);
  if (block.type === "rule") return element("hr");
  if (block.type === "list") return listNode(block);
  const tag = { heading: "h3", quote: "blockquote", paragraph: "p" }[block.type];
  const node = element(tag, block.type === "heading" ? `h${block.level}` : "");
  node.append(...inlineNodes(block.text));
  return node;
}

function codeNode(block) {
  const node = element("div", "code");
  const bar = element("div");
  const copy = element("button", "copy", "Copy");
  copy.type = "button";
  bar.append(element("span", "", block.language || "text"), copy);
  const pre = element("pre");
  pre.append(element("code", "", block.text));
  node.append(bar, pre);
  return node;
}

function listNode(block) {
  const list = element(block.ordered ? "ol" : "ul");
  if (block.ordered && block.start > 1) list.start = block.start;
  for (const item of block.items) {
    const node = element("li");
    node.append(...inlineNodes(item.text));
    if (item.depth) node.style.marginLeft = `${Math.min(item.depth, 6) * 1.2}rem`;
    list.append(node);
  }
  return list;
}

const INLINE = /(`+)(?!`)(.+?)(?<!`)\1(?!`)|\*\*(?=\S)(.+?\S?)\*\*|(?<![\w*])\*(?=[^\s*])(.+?)(?<=\S)\*(?![\w*])/gs;

/** Nodes of code, strong and emphasised text, and of the text between. */
function inlineNodes(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > end) nodes.push(text.slice(end, found.index));
    if (found[2] !== undefined) nodes.push(element("code", "", found[2].trim() || found[2]));
    else if (found[3] !== undefined) nodes.push(withInline(element("strong"), found[3]));
    else nodes.push(withInline(element("em"), found[4]));
    end = found.index + found[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

function withInline(node, text) {
  node.append(...inlineNodes(text));
  return node;
}

/** An element with a class and a text. */
export function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

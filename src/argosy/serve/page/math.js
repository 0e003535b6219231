// Formulas: TeX as models write it, as MathML built from DOM nodes.
//
//   text  ->  tokens  ->  one pass by recursive descent  ->  elements of MathML Core
//
// Each token is read once, nothing is expanded, and nesting is bounded, so time is linear. A formula that is malformed,
// too deep or too long is not drawn: its source is shown instead. A command that is not known is shown as it is written.

const DEEPEST = 60;
export const LONGEST_FORMULA = 20_000;
const TOKEN = /\\(?:[A-Za-z]+|[^])|[0-9]+(?:\.[0-9]+)*|\s+|[^]/uy;

class Malformed extends Error {}

function mathml(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/1998/Math/MathML", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const table = (text) => {
  const words = text.trim().split(/\s+/);
  return new Map(words.flatMap((word, place) => (place % 2 ? [] : [[`\\${word}`, words[place + 1]]])));
};

const LETTERS = table(`
  alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ varkappa ϰ
  lambda λ mu μ nu ν xi ξ omicron ο pi π varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ chi χ
  psi ψ omega ω varGamma Γ varDelta Δ varTheta Θ varLambda Λ varXi Ξ varPi Π varSigma Σ varUpsilon Υ varPhi Φ varPsi Ψ varOmega Ω
  ell ℓ hbar ℏ imath ı jmath ȷ wp ℘ digamma ϝ`);
const UPRIGHT = table(`
  Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω infty ∞ partial ∂ nabla ∇ forall ∀
  exists ∃ nexists ∄ emptyset ∅ varnothing ∅ aleph ℵ beth ℶ Re ℜ Im ℑ top ⊤ bot ⊥ angle ∠ triangle △ square □ Box □
  blacksquare ■ bigstar ★ diamondsuit ♢ heartsuit ♡ clubsuit ♣ spadesuit ♠ sharp ♯ flat ♭ natural ♮ degree ° complement ∁
  hslash ℏ eth ð mho ℧ S § P ¶ pounds £ dag † ddag ‡ checkmark ✓ Diamond ◊ lozenge ◊ measuredangle ∡`);
const OPERATORS = table(`
  pm ± mp ∓ times × div ÷ cdot ⋅ ast ∗ star ⋆ circ ∘ bullet ∙ oplus ⊕ ominus ⊖ otimes ⊗ oslash ⊘ odot ⊙ dagger † ddagger ‡
  cap ∩ cup ∪ uplus ⊎ sqcap ⊓ sqcup ⊔ vee ∨ lor ∨ wedge ∧ land ∧ setminus ∖ smallsetminus ∖ wr ≀ amalg ⨿ diamond ⋄
  bigtriangleup △ triangleleft ◃ triangleright ▹ rtimes ⋊ ltimes ⋉ boxtimes ⊠ boxplus ⊞ neg ¬ lnot ¬
  leq ≤ le ≤ leqslant ⩽ geq ≥ ge ≥ geqslant ⩾ neq ≠ ne ≠ equiv ≡ sim ∼ simeq ≃ approx ≈ approxeq ≊ cong ≅ ncong ≇ propto ∝
  ll ≪ gg ≫ lll ⋘ ggg ⋙ prec ≺ succ ≻ preceq ⪯ succeq ⪰ subset ⊂ supset ⊃ subseteq ⊆ supseteq ⊇ subsetneq ⊊ supsetneq ⊋
  nsubseteq ⊈ sqsubset ⊏ sqsubseteq ⊑ sqsupseteq ⊒ in ∈ notin ∉ ni ∋ owns ∋ mid ∣ nmid ∤ parallel ∥ nparallel ∦ perp ⊥
  vdash ⊢ dashv ⊣ models ⊨ vDash ⊨ Vdash ⊩ asymp ≍ bowtie ⋈ doteq ≐ triangleq ≜ coloneqq ≔ eqqcolon ≕ lesssim ≲ gtrsim ≳
  nless ≮ ngtr ≯ nleq ≰ ngeq ≱ therefore ∴ because ∵ colon : vcentcolon :
  to → rightarrow → leftarrow ← gets ← leftrightarrow ↔ Rightarrow ⇒ Leftarrow ⇐ Leftrightarrow ⇔ implies ⟹ impliedby ⟸
  iff ⟺ mapsto ↦ longmapsto ⟼ longrightarrow ⟶ longleftarrow ⟵ longleftrightarrow ⟷ Longrightarrow ⟹ Longleftarrow ⟸
  Longleftrightarrow ⟺ uparrow ↑ downarrow ↓ updownarrow ↕ Uparrow ⇑ Downarrow ⇓ nearrow ↗ searrow ↘ swarrow ↙ nwarrow ↖
  hookrightarrow ↪ hookleftarrow ↩ rightharpoonup ⇀ rightharpoondown ⇁ leftharpoonup ↼ leftharpoondown ↽
  rightleftharpoons ⇌ leftrightharpoons ⇋ rightrightarrows ⇉ rightleftarrows ⇄ leadsto ⇝ rightsquigarrow ⇝
  twoheadrightarrow ↠ nrightarrow ↛ nRightarrow ⇏ nleftarrow ↚ circlearrowleft ↺ circlearrowright ↻
  ldots … dots … dotsc … dotso … cdots ⋯ dotsb ⋯ dotsm ⋯ vdots ⋮ ddots ⋱ prime ′ backprime ‵ surd √`);
const BIG = table(`
  sum ∑ prod ∏ coprod ∐ bigcap ⋂ bigcup ⋃ bigvee ⋁ bigwedge ⋀ bigoplus ⨁ bigotimes ⨂ bigodot ⨀ biguplus ⨄ bigsqcup ⨆
  int ∫ iint ∬ iiint ∭ oint ∮ oiint ∯ oiiint ∰`);
const DELIMITERS = table(`
  { { } } lbrace { rbrace } langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ | ‖ Vert ‖ lVert ‖ rVert ‖ vert | lvert |
  rvert | lbrack [ rbrack ] lgroup ⟮ rgroup ⟯ ulcorner ⌜ urcorner ⌝ backslash \\`);
const FUNCTIONS = new Set(("arccos arcsin arctan arg cos cosh cot coth csc deg dim exp hom ker lg ln log sec sin sinh tan tanh "
  + "arcsec arccsc arccot arsinh arcosh artanh sgn tr Tr rank").split(" ").map((name) => `\\${name}`));
const LIMITS = table(`
  lim lim max max min min sup sup inf inf det det gcd gcd Pr Pr limsup lim\u2009sup liminf lim\u2009inf argmax arg\u2009max
  argmin arg\u2009min injlim inj\u2009lim projlim proj\u2009lim`.replaceAll("\u2009", "_"));
const ACCENTS = table(`
  hat ˆ widehat ̂ bar ¯ vec → tilde ˜ widetilde ~ dot ˙ ddot ¨ dddot ⃛ check ˇ widecheck ˇ breve ˘ acute ´ grave \`
  mathring ˚ overrightarrow → overleftarrow ← overleftrightarrow ↔ overbrace ⏞ overparen ⏜`);
const UNDER = table("underbrace ⏟ underparen ⏝ underrightarrow → underleftarrow ←");
const WIDE = /^\\(?:over|under|wide)/;
const ARROWS = table(`
  xrightarrow ⟶ xleftarrow ⟵ xRightarrow ⟹ xLeftarrow ⟸ xleftrightarrow ⟷ xLeftrightarrow ⟺ xmapsto ⟼ xlongequal =
  xhookrightarrow ↪ xrightleftharpoons ⇌`);
const SPACES = table(`
  , 0.1667em thinspace 0.1667em : 0.2222em > 0.2222em medspace 0.2222em ; 0.2778em thickspace 0.2778em ! -0.1667em
  negthinspace -0.1667em enspace 0.5em quad 1em qquad 2em nobreakspace 0.25em space 0.25em`);
const FONTS = table(`
  mathbb double mathcal script mathscr script mathfrak fraktur mathbf bold boldsymbol bolditalic bm bolditalic
  mathrm normal mathsf sans mathtt mono mathit italic mathnormal italic pmb bold symbf bold symbb double Bbb double`);
const TEXTS = table(`
  text plain textrm plain textnormal plain mbox plain hbox plain textup plain textsf plain textbf bold textit italic emph italic
  texttt mono textsc plain`);
const SIZES = { big: "1.2em", Big: "1.8em", bigg: "2.4em", Bigg: "3em" };
const FENCES = {
  matrix: "", smallmatrix: "", pmatrix: "()", bmatrix: "[]", Bmatrix: "{}", vmatrix: "||", Vmatrix: "‖‖", cases: "{",
  dcases: "{", rcases: " }", drcases: " }", array: "", subarray: "",
};
const ALIGNED = new Set("aligned align alignat alignedat split eqnarray flalign".split(" "));
const LINES = new Set("gathered gather multline equation displaymath math".split(" "));
/** Environments that are formulas by themselves. */
export const DISPLAYED = new Set("equation align alignat gather multline eqnarray flalign displaymath"
  .split(" ").flatMap((name) => [name, `${name}*`]));
// Content alone: classes of spacing, and sizes that the browser chooses itself.
const TRANSPARENT = new Set("mathop mathrel mathbin mathord mathopen mathclose mathpunct mathinner smash hbox mathstrut"
  .split(" ").map((name) => `\\${name}`));
const IGNORED = new Set(("nonumber notag allowbreak nobreak strut limits nolimits relax centering "
  + "displaylimits small normalsize large tiny").split(" ").map((name) => `\\${name}`));
const LINES_BETWEEN = ["\\hline", "\\toprule", "\\midrule", "\\bottomrule"];
const STYLES = table("displaystyle 0 textstyle 0 scriptstyle 1 scriptscriptstyle 2");
const LITERAL = new Set("%$#&_".split("").map((sign) => `\\${sign}`));

// Letters of the mathematical alphabets: the first capital, small letter, digit, and Greek capital and small letter.
const ALPHABETS = {
  bold: [0x1d400, 0x1d41a, 0x1d7ce, 0x1d6a8, 0x1d6c2],
  bolditalic: [0x1d468, 0x1d482, 0x1d7ce, 0x1d71c, 0x1d736],
  script: [0x1d49c, 0x1d4b6],
  fraktur: [0x1d504, 0x1d51e],
  double: [0x1d538, 0x1d552, 0x1d7d8],
  sans: [0x1d5a0, 0x1d5ba, 0x1d7e2],
  mono: [0x1d670, 0x1d68a, 0x1d7f6],
};
// Letters that had a place in Unicode before those alphabets.
const OLDER = {
  script: { B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ", e: "ℯ", g: "ℊ", o: "ℴ" },
  fraktur: { C: "ℭ", H: "ℌ", I: "ℑ", R: "ℜ", Z: "ℨ" },
  double: { C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" },
};
const RANGES = [["A", "Z"], ["a", "z"], ["0", "9"], ["Α", "Ω"], ["α", "ω"]];

function inFont(text, font) {
  const starts = ALPHABETS[font];
  if (!starts) return text;
  return [...text].map((char) => {
    const place = RANGES.findIndex(([low, high]) => char >= low && char <= high);
    if (OLDER[font]?.[char]) return OLDER[font][char];
    return starts[place] ? String.fromCodePoint(starts[place] + char.codePointAt() - RANGES[place][0].codePointAt()) : char;
  }).join("");
}

const operator = (text, attributes = {}) => mathml("mo", attributes, text);
const still = (text) => operator(text, "|‖/".includes(text) ? { stretchy: "false", lspace: "0", rspace: "0" } : { stretchy: "false" });
const SIGNS = new Set("+−±∓");
const CLOSING = new Set(")]}|‖!⟩⌋⌉′…⋯");
/** Whether what follows this node is a sign of its own and not one between two terms. */
const isBeforeTerm = (node) => !node || (node.tagName === "mo" && !CLOSING.has(node.textContent));
const space = (width) => mathml("mspace", { width });
const group = (nodes) => (nodes.length === 1 ? nodes[0] : mathml("mrow", {}, ...nodes));

/** Words as text; a space at an end is kept. */
function words(text, attributes = {}) {
  const [before, after] = [text.trimStart() !== text, text.trimEnd() !== text].map((isSpaced) => (isSpaced ? "\u00a0" : ""));
  return mathml("mtext", attributes, before + text.trim() + after);
}

class Parser {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.depth = 0;
    this.font = null;
    this.numScripts = 0;
    this.read();
  }

  /** Step to the next token: `token`, which is "" at the end. */
  read() {
    this.from = this.at;
    TOKEN.lastIndex = this.at;
    this.token = TOKEN.exec(this.text)?.[0] ?? "";
    this.at += this.token.length;
  }

  skipSpace() {
    while (this.token.trim() === "" && this.token !== "") this.read();
  }

  /** Read `token` if it is the next one. */
  takes(token) {
    this.skipSpace();
    if (this.token !== token) return false;
    this.read();
    return true;
  }

  /** Pass what `pattern` matches from the next token on. */
  passes(pattern) {
    const found = pattern.exec(this.text.slice(this.from, this.from + 40));
    if (!found) return;
    this.at = this.from + found[0].length;
    this.read();
  }

  needs(token) {
    if (!this.takes(token)) throw new Malformed(token);
  }

  /** The source of a group in braces, or a single token. */
  source() {
    this.skipSpace();
    if (this.token !== "{") {
      const { token } = this;
      if (token === "") throw new Malformed("argument");
      this.read();
      return token;
    }
    const begin = this.at;
    for (let depth = 1; depth > 0;) {
      this.read();
      if (this.token === "") throw new Malformed("}");
      if (this.token === "{") depth += 1;
      if (this.token === "}") depth -= 1;
    }
    const text = this.text.slice(begin, this.from);
    this.read();
    return text;
  }

  /** The source of an optional argument in brackets, or null. */
  option() {
    if (!this.takes("[")) return null;
    const begin = this.from;
    while (this.token !== "]") {
      if (this.token === "") throw new Malformed("]");
      this.read();
    }
    const text = this.text.slice(begin, this.from);
    this.read();
    return text;
  }

  /** What a command is applied to: a group, or the next atom; of a number only its first digit. */
  argument() {
    this.skipSpace();
    if (this.takes("{")) {
      const nodes = this.row("}");
      this.needs("}");
      return group(nodes);
    }
    if (this.token.length > 1 && /[0-9]/.test(this.token[0])) {
      this.at = this.from + 1;
      this.token = this.token[0];
    }
    if (["", "}", "&", "^", "_", "\\\\", "\\right", "\\end"].includes(this.token)) throw new Malformed("argument");
    return this.atom().node;
  }

  script() {
    this.numScripts += 1;
    const made = this.argument();
    this.numScripts -= 1;
    return made;
  }

  /** An operator; in a script it has no space around it. */
  sign(text) {
    if ((this.numScripts && text !== ",") || text === ".") return operator(text, { lspace: "0", rspace: "0" });
    return operator(text, text === ":" ? { lspace: "0.2778em", rspace: "0.2778em" } : {});
  }

  /** An optional argument as a formula of its own. */
  optionRow() {
    const text = this.option();
    return text === null ? null : group(this.inner(text));
  }

  inner(text, font = this.font) {
    const inner = new Parser(text);
    Object.assign(inner, { depth: this.depth + 1, font, numScripts: this.numScripts });
    const nodes = inner.row("");
    if (inner.token !== "") throw new Malformed(inner.token);
    return nodes;
  }

  /** Atoms with their scripts, up to one of `ends`. */
  row(...ends) {
    this.depth += 1;
    if (this.depth > DEEPEST) throw new Malformed("depth");
    const { font } = this;
    const nodes = [];
    for (;;) {
      this.skipSpace();
      const { token } = this;
      if (ends.includes(token)) break;
      if (["", "}", "&", "\\\\", "\\cr", "\\right", "\\end"].includes(token)) throw new Malformed(token);
      if (token === "\\over" || token === "\\choose" || token === "\\atop") {
        this.read();
        const above = group(nodes.splice(0));
        nodes.push(fraction(token, above, group(this.row(...ends))));
        break;
      }
      if (STYLES.has(token)) {
        this.read();
        const style = { displaystyle: String(token === "\\displaystyle"), scriptlevel: STYLES.get(token) };
        nodes.push(mathml("mstyle", style, ...this.row(...ends)));
        break;
      }
      nodes.push(...this.scripted(nodes.at(-1)));
    }
    this.font = font;
    this.depth -= 1;
    return nodes;
  }

  /** An atom with what is above and below it, after the node `last`. */
  scripted(last) {
    const isBare = this.token === "^" || this.token === "_" || this.token === "'";
    const { node, isFunction, hasLimits } = isBare ? { node: mathml("mrow", {}) } : this.atom();
    let [sub, sup, isForced] = [null, null, null];
    for (;;) {
      this.skipSpace();
      if (this.token === "\\limits" || this.token === "\\nolimits") {
        isForced = this.token === "\\limits";
        this.read();
      } else if (this.token === "'" && !sup) {
        let primes = "";
        while (this.takes("'")) primes += "′";
        sup = operator(primes, { class: "prime", lspace: "0", rspace: "0" });
        if (this.takes("^")) sup = mathml("mrow", {}, sup, this.script());
      } else if (this.token === "^" && !sup) {
        this.read();
        sup = this.script();
      } else if (this.token === "_" && !sub) {
        this.read();
        sub = this.script();
      } else {
        break;
      }
    }
    const [below, above] = isForced ?? hasLimits ? ["munder", "mover"] : ["msub", "msup"];
    const both = below === "munder" ? "munderover" : "msubsup";
    if (isForced) node.setAttribute("movablelimits", "false");
    if (hasLimits !== undefined && node.tagName === "mo" && isBeforeTerm(last)) node.setAttribute("lspace", "0");
    const scripts = [sub, sup].filter(Boolean);
    const made = scripts.length ? mathml(sub && sup ? both : sub ? below : above, {}, node, ...scripts) : node;
    if (made === node && node.tagName === "mo" && SIGNS.has(node.textContent) && isBeforeTerm(last)) node.setAttribute("form", "prefix");
    if (!isFunction) return [made];
    this.skipSpace();
    const isClose = ["(", "[", "\\left", "\\bigl", "\\big", "", "}", ")", ",", "&"].includes(this.token);
    const before = !isBeforeTerm(last) && last.tagName !== "mo" && last.tagName !== "mspace" ? [space("0.1667em")] : [];
    return [...before, made, operator("\u2061"), ...(isClose ? [] : [space("0.1667em")])];
  }

  /** One atom: {node, isFunction, hasLimits}. */
  atom() {
    this.depth += 1;
    if (this.depth > DEEPEST) throw new Malformed("depth");
    const found = this.one();
    this.depth -= 1;
    return found.node ? found : { node: found };
  }

  one() {
    const { token } = this;
    this.read();
    if (token === "{") {
      const nodes = this.row("}");
      this.needs("}");
      return mathml("mrow", {}, ...nodes);
    }
    if (token[0] === "\\") return this.command(token);
    if (/[0-9]/.test(token[0])) return mathml("mn", {}, inFont(token, this.font));
    if (/\p{L}/u.test(token)) return this.letter(token);
    if (token === "~") return space("0.25em");
    if ("()[]|/".includes(token)) return still(token);
    return this.sign({ "-": "−", "*": "∗", "`": "‘" }[token] ?? token);
  }

  letter(text, isUpright = false) {
    const { font } = this;
    const isNormal = font === "normal" || (isUpright && font === null) || ALPHABETS[font];
    return mathml("mi", isNormal && [...text].length === 1 ? { mathvariant: "normal" } : {}, inFont(text, font));
  }

  command(name) {
    if (LETTERS.has(name)) return this.letter(LETTERS.get(name));
    if (UPRIGHT.has(name)) return this.letter(UPRIGHT.get(name), true);
    if (OPERATORS.has(name)) return this.sign(OPERATORS.get(name));
    if (BIG.has(name)) return { node: operator(BIG.get(name)), hasLimits: !/int$/.test(name) };
    if (FUNCTIONS.has(name)) return { node: mathml("mi", {}, name.slice(1)), isFunction: true };
    if (LIMITS.has(name)) return limit(LIMITS.get(name).replace("_", "\u2009"));
    if (DELIMITERS.has(name)) return still(DELIMITERS.get(name));
    if (SPACES.has(name)) return space(SPACES.get(name));
    if (FONTS.has(name)) return this.inItsFont(FONTS.get(name));
    if (TEXTS.has(name)) return this.said(TEXTS.get(name));
    if (ACCENTS.has(name)) {
      const isWide = WIDE.test(name);
      const mark = operator(ACCENTS.get(name), isWide ? { stretchy: "true" } : { stretchy: "false", class: "accent" });
      const isBrace = name === "\\overbrace";
      return { node: mathml("mover", isBrace ? {} : { accent: "true" }, this.argument(), mark), hasLimits: isBrace };
    }
    if (UNDER.has(name)) {
      const mark = operator(UNDER.get(name), { stretchy: "true" });
      return { node: mathml("munder", {}, this.argument(), mark), hasLimits: name === "\\underbrace" };
    }
    if (ARROWS.has(name)) {
      const [below, above] = [this.optionRow(), this.argument()];
      const arrow = operator(ARROWS.get(name), { stretchy: "true" });  // browsers stretch no arrow below a label
      const padded = (node, attributes) => mathml("mrow", attributes, space("0.5em"), node, space("0.5em"));
      const label = padded(above, { class: "on-arrow" });
      return below ? mathml("munderover", {}, arrow, padded(below, {}), label) : mathml("mover", {}, arrow, label);
    }
    if (TRANSPARENT.has(name)) return this.argument();
    if (LITERAL.has(name)) return mathml("mtext", {}, name.slice(1));
    if (IGNORED.has(name)) return mathml("mrow", {});
    if (/^\\(?:big|Big|bigg|Bigg)[lrm]?$/.test(name)) {
      const size = SIZES[name.slice(1).replace(/[lrm]$/, "")] ?? SIZES[name.slice(1)];
      const form = { l: { form: "prefix" }, r: { form: "postfix" } }[name.at(-1)] ?? { lspace: "0", rspace: "0" };
      return operator(this.delimiter(), { stretchy: "true", minsize: size, maxsize: size, ...form });
    }
    return this.construct(name);
  }

  construct(name) {
    switch (name) {
      case "\\frac": case "\\dfrac": case "\\tfrac": case "\\cfrac": case "\\binom": case "\\dbinom": case "\\tbinom": {
        const made = fraction(name, this.argument(), this.argument());
        const isForced = name[1] === "d" || name[1] === "t" || name[1] === "c";
        return isForced ? mathml("mstyle", { displaystyle: String(name[1] !== "t"), scriptlevel: "0" }, made) : made;
      }
      case "\\sqrt": {
        const index = this.optionRow();
        return index ? mathml("mroot", {}, this.argument(), index) : mathml("msqrt", {}, this.argument());
      }
      case "\\left": return this.fenced();
      case "\\middle": return operator(this.delimiter(), { stretchy: "true" });
      case "\\begin": return this.environment();
      case "\\overset": case "\\stackrel": {
        const [above, base] = [this.argument(), this.argument()];
        return mathml("mover", {}, base, above);
      }
      case "\\underset": {
        const [below, base] = [this.argument(), this.argument()];
        return mathml("munder", {}, base, below);
      }
      case "\\substack": return rows(this.lines(this.source()), {});
      case "\\operatorname": {
        const hasLimits = this.takes("*");
        const text = this.source().replace(/\\[,;:! ]/g, "\u2009").replace(/\\[A-Za-z]+|[\\{}]/g, "");
        return hasLimits ? limit(text) : { node: mathml("mi", {}, text), isFunction: true };
      }
      case "\\not": {
        const base = this.argument();
        base.append("\u0338");
        return base;
      }
      case "\\pmod": return mathml("mrow", {}, space("0.5em"), still("("), mathml("mi", {}, "mod"), space("0.3em"), this.argument(), still(")"));
      case "\\pod": return mathml("mrow", {}, space("0.5em"), still("("), this.argument(), still(")"));
      case "\\bmod": return operator("mod", { lspace: "0.2222em", rspace: "0.2222em" });
      case "\\mod": return mathml("mrow", {}, space("0.7em"), mathml("mi", {}, "mod"), space("0.3em"));
      case "\\overline": case "\\underline": return mathml("mrow", { class: `${name.slice(1)}d` }, this.argument());
      case "\\boxed": case "\\fbox": return mathml("mrow", { class: "boxed" }, this.argument());
      case "\\cancel": case "\\bcancel": case "\\xcancel": return mathml("mrow", { class: "cancelled" }, this.argument());
      case "\\phantom": case "\\hphantom": case "\\vphantom": return mathml("mphantom", {}, this.argument());
      case "\\tag": {
        this.takes("*");
        return mathml("mrow", {}, space("2em"), words(`(${this.source()})`));
      }
      case "\\ce": return group(this.inner(formulaOf(this.source()), "normal"));
      case "\\label": case "\\require": this.source(); return mathml("mrow", {});
      case "\\hspace": case "\\mspace": case "\\hskip": {
        this.takes("*");
        const width = /^-?[0-9]{1,3}(?:\.[0-9]{1,4})?(?:em|ex|pt|px)$/.exec(this.source().trim())?.[0];
        return space(width ?? "1em");
      }
      // Colours are left to the page's theme.
      case "\\color": this.source(); return mathml("mrow", {});
      case "\\textcolor": case "\\colorbox": this.source(); return this.argument();
      case "\\ ": case "\\\n": return space("0.25em");
      default: return mathml("mtext", { class: "unknown" }, name);
    }
  }

  /** Letters in a font; a word in an upright one is one name. */
  inItsFont(font) {
    this.skipSpace();
    const word = /^\{\s*([A-Za-z]{2,})\s*\}/.exec(this.text.slice(this.from, this.from + 64));
    if (word) {
      this.source();
      return mathml("mi", font === "italic" ? { class: "slanted" } : {}, inFont(word[1], font));
    }
    const before = this.font;
    this.font = font;
    const made = this.argument();
    this.font = before;
    return made;
  }

  /** Words in a formula, and formulas in those words. */
  said(kind) {
    const pieces = this.source().split(/(?<!\\)\$/);
    const nodes = pieces.flatMap((piece, place) => {
      if (place % 2) return this.inner(piece);
      const text = piece.replace(/\\([%$#&_{} ])/g, "$1").replace(/[{}~]/g, (sign) => (sign === "~" ? "\u00a0" : ""));
      return text ? [words(text, kind === "plain" ? {} : { class: `said-${kind}` })] : [];
    });
    return group(nodes);
  }

  delimiter() {
    this.skipSpace();
    const { token } = this;
    this.read();
    if (token === ".") return "";
    const sign = DELIMITERS.get(token) ?? OPERATORS.get(token) ?? { "<": "⟨", ">": "⟩" }[token] ?? token;
    if (sign === "" || /^[\\{}&]./.test(token) && sign === token || [..."^_&{}"].includes(token)) throw new Malformed("delimiter");
    return sign;
  }

  fenced() {
    const open = this.delimiter();
    const nodes = this.row("\\right");
    this.needs("\\right");
    return fence(open, nodes, this.delimiter());
  }

  environment() {
    const full = this.source().trim();
    const name = full.replace(/\*$/, "");
    const isKnown = Object.hasOwn(FENCES, name) || ALIGNED.has(name) || LINES.has(name);
    if (!isKnown) return mathml("mtext", { class: "unknown" }, `\\begin{${full}}`);
    let columns = "";
    if (name === "array" || name === "subarray") {
      this.passes(/^\[[tbc]\]/);
      columns = this.source().replace(/[^lcr|]/g, "");
    } else if (name.startsWith("aligna") || name === "alignedat") {
      this.source();
    } else {
      this.passes(/^\[[tbc]\]/);
    }
    const found = this.cells("\\end");
    this.needs("\\end");
    if (this.source().trim() !== full) throw new Malformed("\\end");
    return laidOut(name, found, columns);
  }

  /** Rows of cells up to `end`; each cell is a list of nodes. */
  cells(end) {
    const found = [[]];
    for (;;) {
      while (LINES_BETWEEN.some((line) => this.takes(line))) found.at(-1).hasLine = true;
      found.at(-1).push(this.row("&", "\\\\", "\\cr", end));
      const { token } = this;
      if (token === end) break;
      this.read();
      if (token === "&") continue;
      this.passes(/^\*?(?:\[\s{0,4}-?[0-9.]{1,8}\s{0,4}[a-z]{2}\s{0,4}\])?/);
      found.push([]);
    }
    const last = found.at(-1);
    if (found.length > 1 && last.length === 1 && last[0].length === 0) {  // a break after the last row
      found.pop();
      found.at(-1).isUnderlined = last.hasLine;
    }
    return found;
  }

  /** Rows of cells in a source of its own. */
  lines(text) {
    const inner = new Parser(text);
    Object.assign(inner, { depth: this.depth + 1, font: this.font, numScripts: this.numScripts });
    return inner.cells("");
  }
}

/** A chemical formula, as in \\ce{2 H2 + O2 -> 2 H2O}, in TeX. */
function formulaOf(text) {
  return text.replace(/<=>|<->|->/g, (arrow) => ({ "<=>": "\\rightleftharpoons ", "<->": "\\leftrightarrow ", "->": "\\rightarrow " })[arrow])
    .replace(/(?<=[A-Za-z)\]])[0-9]+/g, "_{$&}").replace(/\^([0-9]*[+-])/g, "^{$1}")
    .replace(/(?<=^|[\s+>])[0-9]+ ?(?=[A-Z(])/g, "$&\\,");
}

function limit(text) {
  const node = operator(text, { movablelimits: "true", lspace: "0.1667em", rspace: "0.1667em", form: "prefix" });
  return { node, hasLimits: true };
}

function fraction(name, above, below) {
  if (!/binom|choose|atop/.test(name)) return mathml("mfrac", {}, above, below);
  const made = mathml("mfrac", { linethickness: "0" }, above, below);
  return name === "\\atop" ? made : fence("(", [made], ")");
}

function fence(open, nodes, close) {
  const sides = [["prefix", open], ["postfix", close]].map(([form, sign]) => (
    sign.trim() ? [operator(sign, { fence: "true", form, stretchy: "true" })] : []));
  return mathml("mrow", {}, ...sides[0], ...nodes, ...sides[1]);
}

function rows(found, attributes, classOf = () => "") {
  const lineOf = ({ hasLine, isUnderlined }) => [hasLine && "line-above", isUnderlined && "line-below"].filter(Boolean).join(" ");
  return mathml("mtable", attributes, ...found.map((cells) => mathml("mtr", lineOf(cells) && { class: lineOf(cells) }, ...cells.map((nodes, place) => {
    const name = classOf(place);
    return mathml("mtd", name ? { class: name } : {}, ...nodes);
  }))));
}

function laidOut(name, found, columns) {
  if (ALIGNED.has(name) || LINES.has(name)) {
    if (found.length === 1 && found[0].length === 1) return mathml("mstyle", { displaystyle: "true" }, ...found[0][0]);
    for (const [, right] of found) {
      if (right?.[0]?.tagName === "mo") right[0].setAttribute("form", "infix");
    }
    const sideOf = (place) => (LINES.has(name) ? "" : place % 2 ? "left" : "right");
    return rows(found, { displaystyle: "true", class: LINES.has(name) ? "lines" : "aligned" }, sideOf);
  }
  const isCases = name.endsWith("cases");
  const sides = { l: "left", r: "right" };
  const named = (columns.match(/\|?[lcr]/g) ?? []).map((one) => [sides[one.at(-1)], one[0] === "|" && "ruled"].filter(Boolean).join(" "));
  const sideOf = isCases ? () => "left" : (place) => named[place] ?? "";
  const size = name === "dcases" ? { displaystyle: "true" } : name === "smallmatrix" ? { scriptlevel: "1" } : {};
  const made = rows(found, size, sideOf);
  const [open = "", close = ""] = FENCES[name];
  return open ? fence(open, [made], close) : made;
}

/** A formula as an element, or null if it cannot be drawn. `isBlock`: on a line of its own. */
export function formula(tex, isBlock) {
  if (tex.length > LONGEST_FORMULA) return null;
  try {
    const found = new Parser(tex).cells("");
    const isPlain = found.length === 1 && found[0].length === 1;
    const nodes = isPlain ? found[0][0] : [laidOut("aligned", found, "")];
    return mathml("math", isBlock ? { display: "block" } : {}, mathml("mrow", {}, ...nodes));
  } catch (error) {
    if (error instanceof Malformed) return null;
    throw error;
  }
}

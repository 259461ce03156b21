import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import * as library from '@huggingface/tokenizers';
import { encoderOf, trieOf } from './token-models.ts';
import { orRefuse, refuse, UsageError } from './usage-error.ts';

// @huggingface/tokenizers splits some texts otherwise than the Rust library that made the model's training data
// (`."` is one piece of SimpleStories' punctuation to it, for instance, and becomes [UNK]), and fails on documents of
// some megabytes. So of tokenizer.json the pre-tokenizer and the model are done here; the rest is the library's.

// biome-ignore lint/suspicious/noExplicitAny: parts of tokenizer.json, checked by the library that reads them
type Json = Record<string, any>;
const { Tokenizer } = library;
type Tokenizer = library.Tokenizer;
// which its types leave out
const { SplitPreTokenizer, SequenceNormalizer } = library as unknown as {
  SplitPreTokenizer: new (config: Json) => { pattern: RegExp };
  SequenceNormalizer: new (config: Json) => { normalize: Normalize };
};

// ---- Pre-tokenizers: from a text to pieces ----

/** `first`: the text begins a document, and is not what follows an added token. */
type Splitter = (text: string, first: boolean) => string[];

// Rust's character classes: JavaScript's own \s has U+FEFF and lacks U+0085, its \w and \d know ASCII only.
const SPACE = '\\p{White_Space}';
const WORD = '\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}';
const isSpace = (unit: string) => /\p{White_Space}/u.test(unit); // none is beyond U+FFFF
const PUNCTUATION = '[\\p{P}!-/:-@\\[-`{-~]';
const GPT2_WORDS = `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|${SPACE}+(?!\\P{White_Space})|${SPACE}+`;

/** Start and end of every match, one after the other. */
type Find = (text: string) => number[];

function findString(needle: string): Find {
  return text => {
    const found: number[] = [];
    for (let at = text.indexOf(needle); at >= 0; at = text.indexOf(needle, at + needle.length))
      found.push(at, at + needle.length);
    return found;
  };
}

/** The library makes an expression of the Rust library (Oniguruma's) one of JavaScript's. */
const expression = (Regex: string) => new SplitPreTokenizer({ type: 'Split', pattern: { Regex } }).pattern;

function findRegex(source: string): Find {
  const pattern = expression(source);
  let inBlocks: RegExp | undefined;
  const find = (regex: RegExp, text: string) => {
    const found: number[] = [];
    regex.lastIndex = 0;
    for (let match = regex.exec(text); match; match = regex.exec(text)) {
      found.push(match.index, regex.lastIndex);
      if (match[0] === '') regex.lastIndex += (text.codePointAt(match.index) ?? 0) > 0xffff ? 2 : 1;
    }
    return found;
  };
  return text => {
    try {
      return find(pattern, text);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
    }
    inBlocks ??= new RegExp(runsInBlocks(pattern.source), pattern.flags);
    try {
      return find(inBlocks, text);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      return refuse(`a document of ${text.length} characters is too long for the tokenizer's ${source}; cut it`);
    }
  };
}

/**
 * A run of millions of characters overflows JavaScript's stack of places to go back to. At the end of an alternative
 * nobody goes back into a run, so there it is taken in blocks that can't be opened again (a lookahead's capture).
 */
function runsInBlocks(source: string): string {
  let blocks = 0;
  return source.replace(
    /(\\[pP]\{\w+\}|\[(?:[^\\\]]|\\.)*\])\+(?=(?:\[(?:[^\\\]]|\\.)*\]\*)?(?:\||$))/g,
    (_, one) => `(?:(?=(?<block${++blocks}>${one}{1,4096}))\\k<block${blocks}>)+`,
  );
}

/** Splits at what `find` gives; what happens to the matches is one of the Rust library's five behaviours. */
function split(find: Find, behavior: string, invert = false): Splitter {
  /** Whether a stretch of text joins the one before it (each a match or not). */
  const joins = {
    Removed: () => false,
    Isolated: () => false,
    Contiguous: (before: boolean, matches: boolean) => before === matches,
    MergedWithPrevious: (before: boolean, matches: boolean) => !before && matches,
    MergedWithNext: (before: boolean, matches: boolean) => before && !matches,
  }[behavior];
  if (!joins) throw new Error(`Unknown behavior of a Split: ${behavior}`);
  return text => {
    const pieces: string[] = [];
    let [start, end, matched] = [0, 0, false]; // of the piece that is open, and whether it ends in a match
    const close = () => {
      if (start < end && !(behavior === 'Removed' && matched)) pieces.push(text.slice(start, end));
      start = end;
    };
    const add = (to: number, matches: boolean) => {
      if (to === end) return;
      if (!joins(matched, matches)) close();
      end = to;
      matched = matches;
    };
    const found = find(text);
    for (let i = 0; i < found.length; i += 2) {
      add(found[i]!, invert);
      add(found[i + 1]!, !invert);
    }
    add(text.length, invert);
    close();
    return pieces;
  };
}

const bytes = new TextEncoder();
/** Each byte as a letter of its own: itself if it can be seen, else one from U+0100 on. */
const BYTE_LETTERS = (() => {
  const seen = (byte: number) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let unseen = 0;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(seen(byte) ? byte : 256 + unseen++));
})();
function byteLetters(text: string): string {
  let letters = '';
  for (const byte of bytes.encode(text)) letters += BYTE_LETTERS[byte];
  return letters;
}

function sequence(splitters: Splitter[]): Splitter {
  return (text, first) =>
    splitters.reduce((pieces, splitter) => pieces.flatMap((piece, i) => splitter(piece, first && i === 0)), [text]);
}

function preTokenizer(pre: Json): Splitter {
  const regex = (source: string, behavior: string, invert = false) => split(findRegex(source), behavior, invert);
  switch (pre.type) {
    case 'Sequence':
      return sequence(pre.pretokenizers.map(preTokenizer));
    case 'Whitespace':
      return regex(`[${WORD}]+|[^${WORD}${SPACE}]+`, 'Removed', true);
    case 'WhitespaceSplit':
      return regex(`${SPACE}+`, 'Removed');
    case 'BertPreTokenizer':
      return sequence([regex(`${SPACE}+`, 'Removed'), regex(PUNCTUATION, 'Isolated')]);
    case 'Punctuation':
      return regex(PUNCTUATION, pre.behavior ?? 'Isolated');
    case 'Digits':
      return regex('\\p{N}', pre.individual_digits ? 'Isolated' : 'Contiguous');
    case 'CharDelimiterSplit':
      return split(findString(pre.delimiter), 'Removed');
    case 'Split':
      if (pre.pattern.Regex !== undefined) return regex(pre.pattern.Regex, pre.behavior, pre.invert);
      if (!pre.pattern.String) return text => [text];
      return split(findString(pre.pattern.String), pre.behavior, pre.invert);
    case 'FixedLength':
      return text => {
        const characters = [...text];
        const starts = Array.from({ length: Math.ceil(characters.length / pre.length) }, (_, i) => i * pre.length);
        return starts.map(start => characters.slice(start, start + pre.length).join(''));
      };
    case 'Metaspace': {
      const { replacement } = pre;
      const scheme = pre.prepend_scheme ?? (pre.add_prefix_space === false ? 'never' : 'always');
      const words = split(findString(replacement), 'MergedWithNext');
      return (text, first) => {
        const marked = text.replaceAll(' ', replacement);
        const bare = !marked.startsWith(replacement) && (scheme === 'always' || (scheme === 'first' && first));
        const whole = bare ? replacement + marked : marked;
        return pre.split === false ? [whole] : words(whole, first);
      };
    }
    case 'ByteLevel': {
      const words = pre.use_regex === false ? (text: string) => [text] : regex(GPT2_WORDS, 'Isolated');
      return (text, first) => {
        const spaced = pre.add_prefix_space && !text.startsWith(' ') ? ` ${text}` : text;
        return words(spaced, first).map(byteLetters);
      };
    }
    default:
      throw new Error(`Unknown PreTokenizer type: ${pre.type}`);
  }
}

// ---- Normalizers: from a text to a text ----

type Normalize = (text: string) => string;

function normalizer(norm: Json): Normalize {
  const asLibrary = new SequenceNormalizer({ normalizers: [norm] });
  switch (norm.type) {
    case 'Sequence': {
      const steps: Normalize[] = norm.normalizers.map(normalizer);
      return text => steps.reduce((done, step) => step(done), text);
    }
    case 'Replace': {
      const { String: string, Regex } = norm.pattern;
      if (string !== undefined) return text => text.replaceAll(string, () => norm.content); // no $& in it
      const pattern = expression(Regex);
      return text => text.replaceAll(pattern, () => norm.content);
    }
    case 'Strip':
      return text => {
        let [from, to] = [0, text.length];
        while (norm.strip_left && from < to && isSpace(text[from]!)) from++;
        while (norm.strip_right && from < to && isSpace(text[to - 1]!)) to--;
        return text.slice(from, to);
      };
    default:
      return text => {
        // JavaScript lowers a Σ at the end of a word to ς, Rust goes character by character.
        let before = norm.type === 'Lowercase' || norm.lowercase ? text.replaceAll('Σ', 'σ') : text;
        // The library walks UTF-16 halves here and misses the ideographs beyond U+FFFF.
        if (norm.handle_chinese_chars) before = before.replace(FAR_IDEOGRAPHS, ' $& ');
        return asLibrary.normalize(before);
      };
  }
}
const FAR_IDEOGRAPHS = /[\u{20000}-\u{2A6DF}\u{2A700}-\u{2B81F}\u{2B920}-\u{2CEAF}\u{2F800}-\u{2FA1F}]/gu;

// ---- Added tokens: taken out of the text before anything else ----

interface AddedToken {
  id: number;
  content: string;
  single_word?: boolean;
  lstrip?: boolean;
  rstrip?: boolean;
  normalized?: boolean;
  special?: boolean;
}

/** Cuts a text at the longest of the tokens, from the left. @returns texts, and tokens between them */
function cutter(tokens: [string, AddedToken][]): (text: string) => (string | AddedToken)[] {
  const trie = trieOf(tokens.filter(([content]) => content !== ''));
  const inWord = (text: string, from: number, to: number) =>
    WORD_BEFORE.test(text.slice(Math.max(0, from - 2), from)) || WORD_AFTER.test(text.slice(to, to + 2));
  return text => {
    const parts: (string | AddedToken)[] = [];
    let done = 0;
    for (let at = 0; at < text.length; ) {
      const found = trie.longest(text, at);
      if (!found) {
        at++;
        continue;
      }
      const { value: token, end } = found;
      let [from, to] = [at, end];
      at = end;
      if (token.single_word && inWord(text, from, to)) continue;
      if (token.lstrip) while (from > done && isSpace(text[from - 1]!)) from--;
      if (token.rstrip) while (to < text.length && isSpace(text[to]!)) to++;
      if (from > done) parts.push(text.slice(done, from));
      parts.push(token);
      done = to;
      at = Math.max(at, to);
    }
    if (done < text.length) parts.push(text.slice(done));
    return parts;
  };
}
const WORD_BEFORE = new RegExp(`[${WORD}]$`, 'u');
const WORD_AFTER = new RegExp(`^[${WORD}]`, 'u');

/** The tokenizer of a model folder; encodes and decodes as the Rust and Python library does, or refuses by name. */
export function loadTokenizer(dir: string): Tokenizer {
  const file = `${dir}/tokenizer.json`;
  const json: Json | null = orRefuse(file, () => JSON.parse(readFileSync(file, 'utf8')));
  if (typeof json?.model !== 'object' || !json.model)
    return refuse(`${file}: has no "model", so it is no tokenizer.json`);
  const unsupported: [boolean, string][] = [
    [JSON.stringify(json.normalizer)?.includes('"Precompiled"'), 'normalizer "Precompiled"'],
    [Boolean(json.model.continuing_subword_prefix) && json.model.type === 'BPE', 'BPE "continuing_subword_prefix"'],
  ];
  for (const [asked, what] of unsupported)
    if (asked)
      throw new UsageError(`${file}: ${what} is not done here; tokenise in Python and give rows of ids (.json)`);
  return orRefuse(file, () => {
    // Of tokenizer_config.json the library would take clean-ups that the Rust library doesn't do.
    const config = { clean_up_tokenization_spaces: false, unk_token: json.model.unk_token };
    const tokenizer = new Tokenizer({ ...json, pre_tokenizer: null, normalizer: null } as never, config as never);
    (tokenizer as unknown as { encode_text: TokensOf }).encode_text = tokensOf(json, tokenizer);
    repairByteFallback(tokenizer, json);
    return tokenizer;
  });
}

/** The tokens of a text, without those that the post-processor adds. */
type TokensOf = (text: string | null) => string[] | null; // null: there is no second text

function tokensOf(json: Json, tokenizer: Tokenizer): TokensOf {
  const normalize: Normalize = json.normalizer ? normalizer(json.normalizer) : text => text;
  const pieces: Splitter = json.pre_tokenizer ? preTokenizer(json.pre_tokenizer) : text => [text];
  const idsOf = encoderOf(json.model);
  const added: AddedToken[] = json.added_tokens ?? [];
  const isNormalized = (token: AddedToken) => token.normalized ?? !token.special;
  const cut = cutter(added.filter(token => !isNormalized(token)).map(token => [token.content, token]));
  const cutNormalized = cutter(added.filter(isNormalized).map(token => [normalize(token.content), token]));
  const { vocab } = tokenizer.model as unknown as { vocab: string[] };
  return given => {
    if (given === null) return null;
    let first = true;
    const wellFormed = given.replace(/\p{Surrogate}/gu, '\ufffd'); // as half a pair becomes in UTF-8
    return cut(wellFormed).flatMap(part => {
      const parts = typeof part === 'string' ? cutNormalized(normalize(part)) : [part];
      return parts.flatMap(text => {
        const ids = typeof text === 'string' ? pieces(text, first).flatMap(idsOf) : [text.id];
        first = false;
        return ids.map(id => vocab[id]!);
      });
    });
  };
}

/** A run of byte tokens that is no UTF-8 is decoded to one U+FFFD a byte, and a byte order mark stays. */
function repairByteFallback(tokenizer: Tokenizer, json: Json): void {
  const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
  const decode = (bytes: Uint8Array) => {
    try {
      return utf8.decode(bytes);
    } catch {
      return '\ufffd'.repeat(bytes.length);
    }
  };
  const decoders: Json[] = (tokenizer.decoder as Json | null)?.decoders ?? [];
  for (const [i, part] of decoders.entries())
    if (json.decoder.decoders[i].type === 'ByteFallback') part.text_decoder = { decode };
}

/** The tokenizer of a model's folder; undefined where it has none, which is enough for rows of ids. */
export const tokenizerOf = (dir: string): Tokenizer | undefined =>
  existsSync(path.join(dir, 'tokenizer.json')) ? loadTokenizer(dir) : undefined;

import { readFileSync } from 'node:fs';
import { Tokenizer } from '@huggingface/tokenizers';

import { orRefuse, refuse, UsageError } from './usage-error.ts';

// @huggingface/tokenizers splits some texts otherwise than the Rust library that made the model's training data
// (`."` is one piece of SimpleStories' punctuation to it, for instance, and becomes [UNK]). What it does alike is a
// Split with behaviour Isolated or Removed, so tokenizer.json is rewritten to that before it is loaded.

// biome-ignore lint/suspicious/noExplicitAny: parts of tokenizer.json, checked by the library that reads them
type Json = Record<string, any>;

// Rust's character classes: JavaScript's own \s has U+FEFF and lacks U+0085, its \w and \d know ASCII only.
const SPACE = '\\p{White_Space}';
const WORD = '\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}';
const PUNCTUATION = '[\\p{P}!-/:-@\\[-`{-~]';
const GPT2_WORDS = `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|${SPACE}+(?!\\P{White_Space})|${SPACE}+`;

const sequence = (...pretokenizers: Json[]): Json => ({ type: 'Sequence', pretokenizers });
const replace = (Regex: string, content: string): Json => ({ type: 'Replace', pattern: { Regex }, content });

/** Splits text at `pattern`; what happens to the matches is one of the Rust library's five behaviours. */
function split(pattern: string, behavior: string, invert = false): Json {
  const others = `(?:(?!${pattern})[\\s\\S])*`;
  const isolated: Json = {
    Contiguous: `(?:${pattern})+`,
    MergedWithPrevious: `${others}(?:${pattern})`,
    MergedWithNext: `(?:${pattern})${others}`,
  };
  const Regex = isolated[behavior] ?? pattern;
  return { type: 'Split', pattern: { Regex }, behavior: behavior === 'Removed' ? 'Removed' : 'Isolated', invert };
}

function preTokenizer(pre: Json): Json {
  switch (pre.type) {
    case 'Sequence':
      return sequence(...pre.pretokenizers.map(preTokenizer));
    case 'Whitespace':
      return split(`[${WORD}]+|[^${WORD}${SPACE}]+`, 'Removed', true);
    case 'WhitespaceSplit':
      return split(`${SPACE}+`, 'Removed');
    case 'BertPreTokenizer':
      return sequence(split(`${SPACE}+`, 'Removed'), split(PUNCTUATION, 'Isolated'));
    case 'Punctuation':
      return split(PUNCTUATION, pre.behavior ?? 'Isolated');
    case 'Digits':
      return split('\\p{N}', pre.individual_digits ? 'Isolated' : 'Contiguous');
    case 'Split': {
      const pattern = pre.pattern.Regex ?? pre.pattern.String.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
      return pre.invert ? pre : split(pattern, pre.behavior);
    }
    case 'Metaspace': {
      const prepend_scheme = pre.prepend_scheme ?? (pre.add_prefix_space === false ? 'never' : 'always');
      const whole = { ...pre, prepend_scheme };
      return pre.split === false ? whole : sequence(whole, split(pre.replacement, 'MergedWithNext'));
    }
    case 'ByteLevel':
      if (pre.use_regex === false || pre.add_prefix_space) return pre;
      return sequence(split(GPT2_WORDS, 'Isolated'), { ...pre, use_regex: false });
    default:
      return pre;
  }
}

function normalizer(norm: Json): Json {
  const before: Json[] = [];
  // JavaScript lowers a Σ at the end of a word to ς, Rust goes character by character.
  if (norm.type === 'Lowercase' || norm.lowercase) before.push(replace('Σ', 'σ'));
  // The library walks UTF-16 halves here and misses the ideographs beyond U+FFFF.
  if (norm.handle_chinese_chars) before.push(replace('[\\x{20000}-\\x{2CEAF}\\x{2F800}-\\x{2FA1F}]', ' $& '));
  const normalizers = norm.type === 'Sequence' ? norm.normalizers.map(normalizer) : [...before, norm];
  return { type: 'Sequence', normalizers };
}

/** The tokenizer of a model folder; encodes and decodes as the Rust and Python library does, or refuses by name. */
export function loadTokenizer(dir: string): Tokenizer {
  const file = `${dir}/tokenizer.json`;
  const json: Json | null = orRefuse(file, () => JSON.parse(readFileSync(file, 'utf8')));
  if (typeof json?.model !== 'object' || !json.model)
    return refuse(`${file}: has no "model", so it is no tokenizer.json`);
  const unsupported: [boolean, string][] = [
    [JSON.stringify(json.normalizer)?.includes('"Precompiled"'), 'normalizer "Precompiled"'],
    [Boolean(json.model.continuing_subword_prefix) && json.model.type === 'BPE', 'BPE "continuing_subword_prefix"'],
    [json.model.type === 'Unigram' && json.model.byte_fallback === true, 'Unigram "byte_fallback"'],
    [(json.added_tokens ?? []).some((t: Json) => t.single_word), 'added token with "single_word"'],
  ];
  for (const [asked, what] of unsupported)
    if (asked)
      throw new UsageError(`${file}: ${what} is not done here; tokenise in Python and give rows of ids (.json)`);
  let tokenizer: Tokenizer;
  try {
    const rewritten = {
      ...json,
      pre_tokenizer: json.pre_tokenizer && preTokenizer(json.pre_tokenizer),
      normalizer: json.normalizer && normalizer(json.normalizer),
    };
    // Of tokenizer_config.json the library would take clean-ups that the Rust library doesn't do.
    const config = { clean_up_tokenization_spaces: false, unk_token: json.model.unk_token };
    tokenizer = new Tokenizer(rewritten as never, config as never);
  } catch (error) {
    throw new UsageError(`${file}: ${(error as Error).message}`);
  }
  // A run of byte tokens that is no UTF-8 is one U+FFFD a byte, and a byte order mark stays.
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
  return tokenizer;
}

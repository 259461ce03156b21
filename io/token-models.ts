// From pieces of text to token ids: byte-pair encoding, unigram, word pieces and whole words, as the Rust library does
// them, in about linear time. (@huggingface/tokenizers fuses unknown tokens across pieces, and ends in a RangeError on
// pieces of some megabytes.)

// biome-ignore lint/suspicious/noExplicitAny: the "model" of a tokenizer.json, of which only the parts named here are read
type Json = Record<string, any>;

/** The ids of one piece of text. @throws Error when a word is unknown and the vocabulary has no unknown token */
type Encode = (piece: string) => number[];

/** The model of a tokenizer.json; old files don't name its type. @throws Error for a type that is not one of the four */
export function encoderOf(model: Json): Encode {
  const untyped = Array.isArray(model.vocab) ? 'Unigram' : model.merges ? 'BPE' : 'WordLevel';
  const type = model.type ?? (model.max_input_chars_per_word ? 'WordPiece' : untyped);
  if (type === 'BPE') return remembered(bytePairs(model));
  if (type === 'Unigram') return remembered(unigram(model));
  if (type === 'WordPiece') return remembered(wordPieces(model));
  if (type === 'WordLevel') return wholeWords(model);
  throw new Error(`Unknown model type: ${type}`);
}

const REMEMBERED = 1 << 14; // pieces, all shorter than this many characters:
const SHORT = 64;

/** Words come again and again: the ids of short pieces are kept. */
function remembered(encode: Encode): Encode {
  const known = new Map<string, number[]>();
  return piece => {
    if (piece.length > SHORT) return encode(piece);
    let ids = known.get(piece);
    if (ids) return ids;
    ids = encode(piece);
    if (known.size >= REMEMBERED) known.clear();
    known.set(piece, ids);
    return ids;
  };
}

const utf8 = new TextEncoder();
/** The ids of `<0x..>` for a text's bytes, if the vocabulary has them all. */
function byteIds(text: string, vocab: ReadonlyMap<string, number>): number[] | undefined {
  const name = (byte: number) => `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`;
  const ids = Array.from(utf8.encode(text), byte => vocab.get(name(byte)));
  return ids.includes(undefined) ? undefined : (ids as number[]);
}

/** A heap that gives the smallest number first. */
function smallestFirst() {
  let heap = new Float64Array(64);
  let size = 0;
  return {
    push(value: number) {
      if (size === heap.length) {
        const larger = new Float64Array(2 * size);
        larger.set(heap);
        heap = larger;
      }
      let at = size++;
      for (let up = (at - 1) >> 1; at > 0 && heap[up]! > value; up = (at - 1) >> 1) {
        heap[at] = heap[up]!;
        at = up;
      }
      heap[at] = value;
    },
    pop(): number | undefined {
      if (size === 0) return undefined;
      const smallest = heap[0]!;
      const last = heap[--size]!;
      let at = 0;
      for (let down = 1; down < size; down = 2 * at + 1) {
        if (down + 1 < size && heap[down + 1]! < heap[down]!) down++;
        if (heap[down]! >= last) break;
        heap[at] = heap[down]!;
        at = down;
      }
      heap[at] = last;
      return smallest;
    },
  };
}

/**
 * Byte-pair encoding: of all neighbours that merge, those of the earliest rule are merged first, and of those the
 * leftmost. The heap holds rank * length + position; an entry whose pair has changed since is passed over.
 */
function bytePairs(model: Json): Encode {
  const vocab = new Map<string, number>(Object.entries(model.vocab));
  const suffix: string = model.end_of_word_suffix ?? '';
  const unknown = vocab.get(model.unk_token);
  const rules = new Map<number, Map<number, { rank: number; id: number }>>(); // left id, right id
  for (const [rank, merge] of (model.merges as (string | [string, string])[]).entries()) {
    const [left = '', right = ''] = typeof merge === 'string' ? merge.split(' ', 2) : merge;
    const [a, b, id] = [vocab.get(left), vocab.get(right), vocab.get(left + right)];
    if (a === undefined || b === undefined || id === undefined)
      throw new Error(`model: merge ${rank} (${left} ${right}) is not in the vocabulary`);
    if (!rules.has(a)) rules.set(a, new Map());
    rules.get(a)!.set(b, { rank, id });
  }

  function symbols(piece: string): number[] {
    const ids: number[] = [];
    let afterUnknown = false;
    let end = 0;
    for (const character of piece) {
      end += character.length;
      const symbol = end === piece.length ? character + suffix : character;
      const id = vocab.get(symbol);
      const bytes = id === undefined && model.byte_fallback ? byteIds(symbol, vocab) : undefined;
      if (id !== undefined) ids.push(id);
      else if (bytes) for (const byte of bytes) ids.push(byte);
      else if (unknown !== undefined && !(afterUnknown && model.fuse_unk)) ids.push(unknown);
      afterUnknown = id === undefined && !bytes;
    }
    return ids;
  }

  return piece => {
    const whole = model.ignore_merges ? vocab.get(piece) : undefined;
    if (whole !== undefined) return [whole];
    const ids = symbols(piece);
    const length = ids.length;
    if (length < 2) return ids;
    // a chain of symbols: merging takes the right one out
    const next = Int32Array.from(ids, (_, i) => i + 1);
    const previous = Int32Array.from(ids, (_, i) => i - 1);
    const gone = new Uint8Array(length);
    const queue = smallestFirst();
    const rule = (at: number) => (next[at]! < length ? rules.get(ids[at]!)?.get(ids[next[at]!]!) : undefined);
    const offer = (at: number) => {
      const found = rule(at);
      if (found) queue.push(found.rank * length + at);
    };
    for (let i = 0; i < length - 1; i++) offer(i);
    for (let entry = queue.pop(); entry !== undefined; entry = queue.pop()) {
      const at = entry % length;
      const found = gone[at] ? undefined : rule(at);
      if (!found || found.rank !== (entry - at) / length) continue;
      const right = next[at]!;
      ids[at] = found.id;
      gone[right] = 1;
      next[at] = next[right]!;
      if (next[at]! < length) previous[next[at]!] = at;
      if (previous[at]! >= 0) offer(previous[at]!);
      offer(at);
    }
    return ids.filter((_, i) => !gone[i]);
  };
}

/** Words by their UTF-16 units: `step` walks from the root (0), `ends` has the value of the word that ends there. */
export function trieOf<V>(words: Iterable<[string, V]>) {
  const children: Map<number, number>[] = [new Map()];
  const ends: (V | undefined)[] = [undefined];
  for (const [word, value] of words) {
    let node = 0;
    for (let i = 0; i < word.length; i++) {
      const unit = word.charCodeAt(i);
      let child = children[node]!.get(unit);
      if (child === undefined) {
        child = children.push(new Map()) - 1;
        children[node]!.set(unit, child);
        ends.push(undefined);
      }
      node = child;
    }
    ends[node] = value;
  }
  const step = (node: number, unit: number) => children[node]!.get(unit);
  /** The longest word that begins at `start`. */
  const longest = (text: string, start: number) => {
    let found: { value: V; end: number } | undefined;
    let node: number | undefined = 0;
    for (let end = start; end < text.length; ) {
      node = step(node, text.charCodeAt(end++));
      if (node === undefined) break;
      const value = ends[node];
      if (value !== undefined) found = { value, end };
    }
    return found;
  };
  return { step, ends, longest };
}

const UNKNOWN_PENALTY = 10; // below the lowest score of the vocabulary

/** Unigram: the pieces of the highest total score (Viterbi), an earlier start winning a tie. */
function unigram(model: Json): Encode {
  const entries = model.vocab as [string, number][];
  const vocab = new Map(entries.map(([word], id) => [word, id]));
  const trie = trieOf(vocab);
  const unknown: number | undefined = model.unk_id ?? undefined;
  const unknownScore = entries.reduce((lowest, [, score]) => Math.min(lowest, score), Infinity) - UNKNOWN_PENALTY;
  return text => {
    const length = text.length;
    // of the best pieces that end at a position: their score, the last one's start and id
    const score = new Float64Array(length + 1).fill(-Infinity);
    const start = new Int32Array(length + 1);
    const token = new Int32Array(length + 1);
    score[0] = 0;
    const offer = (from: number, to: number, id: number, more: number) => {
      const total = score[from]! + more;
      if (total <= score[to]!) return;
      score[to] = total;
      start[to] = from;
      token[to] = id;
    };
    for (let from = 0; from < length; ) {
      const character = text.codePointAt(from)! > 0xffff ? 2 : 1;
      let single = false;
      let node: number | undefined = 0;
      for (let to = from; to < length; ) {
        node = trie.step(node, text.charCodeAt(to++));
        if (node === undefined) break;
        const id = trie.ends[node];
        if (id === undefined) continue;
        offer(from, to, id, entries[id]![1]);
        single ||= to - from === character;
      }
      if (!single) {
        if (unknown === undefined) throw new Error('model: a character is unknown, and there is no unk_id');
        offer(from, from + character, unknown, unknownScore);
      }
      from += character;
    }
    const ids: number[] = []; // from the end
    for (let to = length; to > 0; to = start[to]!) {
      const last = to;
      if (token[to] === unknown) while (start[to]! > 0 && token[start[to]!] === unknown) to = start[to]!; // fused
      const piece = token[last] === unknown ? text.slice(start[to]!, last) : '';
      const bytes = piece && model.byte_fallback ? byteIds(piece, vocab) : undefined;
      if (bytes) for (const byte of bytes.reverse()) ids.push(byte);
      else ids.push(token[last]!);
    }
    return ids.reverse();
  };
}

/** Word pieces: the longest entry first, again and again; a word that has none for its rest is unknown as a whole. */
function wordPieces(model: Json): Encode {
  const vocab = new Map<string, number>(Object.entries(model.vocab));
  const prefix: string = model.continuing_subword_prefix ?? '##';
  const longest = [...vocab.keys()].reduce((most, word) => Math.max(most, word.length), 0);
  const most: number = model.max_input_chars_per_word ?? 100;
  return word => {
    const unknown = () => {
      const id = vocab.get(model.unk_token);
      if (id === undefined) throw new Error('model: a word is unknown, and unk_token is not in the vocabulary');
      return [id];
    };
    if (word.length > 2 * most) return unknown();
    const characters = [...word];
    if (characters.length > most) return unknown();
    const ids: number[] = [];
    for (let start = 0; start < characters.length; ) {
      let end = Math.min(characters.length, start + longest);
      let id: number | undefined;
      for (; end > start; end--) {
        id = vocab.get((start > 0 ? prefix : '') + characters.slice(start, end).join(''));
        if (id !== undefined) break;
      }
      if (id === undefined) return unknown();
      ids.push(id);
      start = end;
    }
    return ids;
  };
}

function wholeWords(model: Json): Encode {
  const vocab = new Map<string, number>(Object.entries(model.vocab));
  return word => {
    const id = vocab.get(word) ?? vocab.get(model.unk_token);
    if (id === undefined) throw new Error('model: a word is unknown, and unk_token is not in the vocabulary');
    return [id];
  };
}

/**
 * interpret: what each component means, in words, and how far the words can be trusted.
 *
 * Four kinds of questions, to any chat-completions endpoint, or on paper (--prompts-only, --answers FILE):
 *   label      what does it do? from token statistics and windows of text where it fires
 *   detection  with the label alone: in which of 10 windows does it fire? balanced accuracy, chance 0.5
 *   fuzzing    with the label alone: in which of 7 windows are the right tokens marked? balanced accuracy, chance 0.5
 *   intruder   without a label: which of 5 windows is another component's? chance 0.2; judges the decomposition
 * The label's windows are not those that it is tried on. Every answer is kept, once paid, in
 * interpretations.answers.jsonl, by a name that has the hash of its question: a second start asks only what is missing.
 */
import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import { uniformArray } from '../nano-param-decomp.ts';
import type { Message } from './chat.ts';
import { type Answer, ask, type Budget, ENDPOINT_FLAGS, type Endpoint, endpointFrom, makeBudget } from './chat.ts';
import { NEIGHBOURS, type Neighbours, neighbourLines, readNeighbours } from './interpret-graph.ts';
import { type MarkedWindow, POOL_POSITIONS, type Pool, readPool, type Window } from './interpret-pool.ts';
import type { Example, Harvest, HarvestComponent } from './run-files.ts';
import * as files from './run-files.ts';

export const FLAGS = {
  ...ENDPOINT_FLAGS,
  'max-tokens': 'string', // budget of this start, in and out; it stops before it is passed
  concurrency: 'string', // questions under way, default 8
  'price-in': 'string', // per million tokens, for the cost line
  'price-out': 'string',
  'prompts-only': 'boolean', // writes the questions that have no answer yet to interpretations.prompts.jsonl
  answers: 'string', // reads answers from a JSONL: {"id","content"} a line, the ids of the questions
  most: 'string', // components, those that fire most first; default all
  'ask-again': 'boolean', // asks once more where an answer could not be read
  graph: 'boolean', // labels that know their neighbours, after attributions
} as const;

// ---- Windows --------------------------------------------------------------------------------------------------------

/** A component as the trials see it: where it fires, and other text. */
export type Subject = {
  module: string;
  index: number;
  density: number;
  windows: Window[]; // random ones with a firing, not those that the label was made from; `at` is in the middle
};

/** Draws in [0, 1) that are a function of a name: the questions of a component are the same at every start. */
export function drawsOf(name: string): () => number {
  const seed = crypto.createHash('sha256').update(name).digest().readInt32LE(0);
  let [draws, used]: [ArrayLike<number>, number] = [[], 0];
  let block = 0;
  return () => {
    if (used === draws.length) {
      draws = uniformArray(64, seed, block++, PURPOSE_TRIAL);
      used = 0;
    }
    return draws[used++]!;
  };
}
const PURPOSE_TRIAL = 12; // of random numbers, beside those of the method

function shuffle<X>(list: readonly X[], random: () => number): X[] {
  const out = [...list];
  for (let i = out.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [out[i], out[j]] = [out[j]!, out[i]!];
  }
  return out;
}

/** Cut to `length` tokens, so that the firing nearest the middle stays in the middle. */
function cut({ row, start, tokens, fires }: Window, length: number): Window {
  if (tokens.length <= length) return { row, start, tokens, fires };
  const middle = Math.floor(tokens.length / 2);
  const at = fires.reduce((best, f) => (Math.abs(f - middle) < Math.abs(best - middle) ? f : best), fires[0] ?? middle);
  const first = Math.min(Math.max(0, at - Math.floor(length / 2)), tokens.length - length);
  return {
    row,
    start: start + first,
    tokens: tokens.slice(first, first + length),
    fires: fires.map(f => f - first).filter(f => f >= 0 && f < length),
  };
}

/** Pieces of the pool, `length` tokens long, in which it fires nowhere: at most `count`, of different places. */
function quietWindows({ rows, fires }: Pool, subject: Subject, length: number, count: number, random: () => number) {
  const places = rows.flatMap((tokens, row) =>
    Array.from({ length: Math.floor(tokens.length / length) }, (_, i) => ({ row, start: i * length })),
  );
  const found: Window[] = [];
  for (const { row, start } of shuffle(places, random)) {
    if (found.length === count) break;
    const tokens = rows[row]!.slice(start, start + length);
    if (!tokens.some((_, p) => fires(subject.module, subject.index, row, start + p)))
      found.push({ row, start, tokens, fires: [] });
  }
  return found;
}

// ---- Trials ---------------------------------------------------------------------------------------------------------

/** Windows to judge; `right`: the numbers (from 1) that a perfect judge names. `marked` tokens are shown marked. */
export type Trial = { kind: TrialKind; windows: (Window & { marked: number[] })[]; right: number[] };
export type TrialKind = 'detection' | 'fuzzing' | 'intruder';
export const TRIALS = { detection: 5, fuzzing: 5, intruder: 10 } as const;
export const CHANCE = { detection: 0.5, fuzzing: 0.5, intruder: 0.2 } as const;
const DETECTION_WINDOWS = 5; // of either sort
const FUZZING_WINDOWS = { right: 5, wrong: 2 };
const INTRUDER_WINDOWS = 4;
const SIMILAR_DENSITY = 0.05;
const LENGTHS = [41, 24, 16, 10, 6, 4]; // of windows: the longest at which there is text where it does not fire

const trialOf = (kind: TrialKind, windows: { window: Trial['windows'][number]; right: boolean }[]): Trial => ({
  kind,
  windows: windows.map(({ window }) => window),
  right: windows.flatMap(({ right }, i) => (right ? [i + 1] : [])),
});
const unmarked = (window: Window) => ({ ...window, marked: [] });

/** 5 windows where it fires and 5 where it does not, unmarked, shuffled; none where it fires too rarely or everywhere. */
export function detectionTrials(subject: Subject, pool: Pool): Trial[] {
  const random = drawsOf(`detection ${subject.module}:${subject.index}`);
  for (const length of LENGTHS) {
    const quiet = quietWindows(pool, subject, length, DETECTION_WINDOWS * TRIALS.detection, random);
    const positive = subject.windows.map(window => cut(window, length)).filter(({ fires }) => fires.length > 0);
    const n = Math.min(DETECTION_WINDOWS, positive.length);
    if (n < 2) return [];
    if (quiet.length < DETECTION_WINDOWS) continue;
    return Array.from({ length: TRIALS.detection }, () => {
      const chosen = shuffle(positive, random).slice(0, n);
      const others = shuffle(quiet, random).slice(0, n);
      return trialOf(
        'detection',
        shuffle(
          [
            ...chosen.map(window => ({ window: unmarked(window), right: true })),
            ...others.map(window => ({ window: unmarked(window), right: false })),
          ],
          random,
        ),
      );
    });
  }
  return [];
}

/** 5 windows with the firing tokens marked and 2 with as many others marked, shuffled. */
export function fuzzingTrials(subject: Subject): Trial[] {
  const random = drawsOf(`fuzzing ${subject.module}:${subject.index}`);
  const wrongly = (window: Window) => {
    const others = window.tokens.map((_, i) => i).filter(i => !window.fires.includes(i));
    const marked = shuffle(others, random).slice(0, window.fires.length).sort((a, b) => a - b); // biome-ignore format: a line
    return { ...window, marked };
  };
  const usable = subject.windows.filter(({ fires, tokens }) => fires.length > 0 && 2 * fires.length <= tokens.length);
  const { right, wrong } = FUZZING_WINDOWS;
  if (usable.length < 2) return [];
  return Array.from({ length: TRIALS.fuzzing }, () => {
    const chosen = Array.from({ length: right + wrong }, (_, i) => i % usable.length);
    const order = shuffle(usable, random);
    return trialOf(
      'fuzzing',
      shuffle(
        chosen.map((which, i) => {
          const window = order[which]!;
          return { window: i < right ? { ...window, marked: window.fires } : wrongly(window), right: i < right };
        }),
        random,
      ),
    );
  });
}

/** 4 windows of it and 1 of another whose density is within 0.05, all marked where their own component fires. */
export function intruderTrials(subject: Subject, others: readonly Subject[]): Trial[] {
  const random = drawsOf(`intruder ${subject.module}:${subject.index}`);
  const similar = others.filter(
    other =>
      !(other.module === subject.module && other.index === subject.index) &&
      Math.abs(other.density - subject.density) <= SIMILAR_DENSITY &&
      other.windows.length > 0,
  );
  if (similar.length === 0 || subject.windows.length < INTRUDER_WINDOWS) return [];
  const pick = <X>(list: readonly X[]) => list[Math.floor(random() * list.length)]!;
  return Array.from({ length: TRIALS.intruder }, () => {
    const own = shuffle(subject.windows, random).slice(0, INTRUDER_WINDOWS);
    const intruder = pick(pick(similar).windows);
    return trialOf(
      'intruder',
      shuffle(
        [...own.map(window => ({ window, right: false })), { window: intruder, right: true }].map(w => ({
          window: { ...w.window, marked: w.window.fires },
          right: w.right,
        })),
        random,
      ),
    );
  });
}

/** How good an answer is: balanced accuracy, of the intruder 1 or 0. */
export function scoreTrial({ kind, windows, right }: Trial, named: readonly number[]): number {
  if (kind === 'intruder') return named.length === 1 && named[0] === right[0] ? 1 : 0;
  const shareOf = (wanted: boolean) => {
    const all = windows.map((_, i) => i + 1).filter(n => right.includes(n) === wanted);
    return all.filter(n => named.includes(n) === wanted).length / all.length;
  };
  return (shareOf(true) + shareOf(false)) / 2;
}

/**
 * The intruder by token overlap alone: the window whose marked tokens have the least in common with the others' (mean
 * Jaccard index; all tokens decide between equals). The share that guessing among equals would score.
 */
export function overlapBaseline({ windows, right }: Trial): number {
  const jaccard = (a: Set<number>, b: Set<number>) => {
    const both = [...a].filter(t => b.has(t)).length;
    return both / Math.max(1, a.size + b.size - both);
  };
  const sets = windows.map(({ tokens, marked }) => new Set(marked.map(i => tokens[i]!)));
  const all = windows.map(({ tokens }) => new Set(tokens));
  const common = (of: Set<number>[], i: number) =>
    of.reduce((sum, other, j) => sum + (i === j ? 0 : jaccard(of[i]!, other)), 0);
  const scores = windows.map((_, i) => common(sets, i) + 1e-6 * common(all, i));
  const least = Math.min(...scores);
  const equals = scores.flatMap((score, i) => (score - least < 1e-12 ? [i + 1] : []));
  return equals.includes(right[0]!) ? 1 / equals.length : 0;
}

// ---- Questions ------------------------------------------------------------------------------------------------------

export type Kind = 'label' | TrialKind | 'graph-output' | 'graph-input' | 'graph-label';
export type Question = { id: string; module: string; index: number; kind: Kind; messages: Message[] };

function questionOf(component: { module: string; index: number }, kind: Kind, number: number, content: string) {
  const { module, index } = component;
  const messages: Message[] = [
    { role: 'system', content: INTRODUCTION },
    { role: 'user', content },
  ];
  const hash = crypto.createHash('sha256').update(JSON.stringify(messages)).digest('hex').slice(0, 12);
  return { id: `${module}:${index}/${kind}/${number}/${hash}`, module, index, kind, messages };
}

const INTRODUCTION = [
  'You help to understand a language model whose weight matrices were each written as a sum of rank-one components.',
  'A component reads one direction of what enters its matrix and writes one direction into what leaves it.',
  'At every token it has two numbers. Its causal importance, from 0 to 1, says how much the output at that token needs',
  'it: where it is 0 the component can be removed without effect; where it is above 0 we say that it fires.',
  'Its activation is how strongly, and with which sign, it is driven there.',
  'In texts, tokens at which a component fires stand between << and >>.',
  'Answer with one JSON object and nothing else.',
].join('\n');

type Texts = (token: number) => string;
/** Tokens as the model reads them; line breaks shown, and nothing that could turn the reading direction. */
const shown = (text: string) => text.replace(/\n/g, '⏎').replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '�');
const windowText = ({ tokens, marked }: Trial['windows'][number], text: Texts) =>
  tokens
    .map((token, i) => (marked.includes(i) ? `<<${shown(text(token))}>>` : shown(text(token))))
    .join('')
    .trim();
const numbered = (trial: Trial, text: Texts) =>
  trial.windows.map((window, i) => `${i + 1}. ${windowText(window, text)}`).join('\n');

const percent = (share: number) => `${Number((100 * share).toPrecision(2))} %`;
const tokenTable = (
  title: string,
  rows: HarvestComponent['input']['top'],
  text: Texts,
  count: (n: number) => string,
) =>
  rows.length === 0
    ? ''
    : `${title}\n${rows
        .map(
          ([token, n, pmi]) =>
            `  ${JSON.stringify(shown(text(token)))}  ${count(n)}, PMI ${pmi === null ? '-inf' : pmi.toFixed(2)}`,
        )
        .join('\n')}\n`;
const byCount = (rows: HarvestComponent['input']['top']) => [...rows].sort((a, b) => b[1] - a[1]);

function statistics(component: HarvestComponent, text: Texts): { input: string; output: string } {
  const { firings, input, output } = component;
  const share = (n: number) => `${percent(n / firings)} of its firings`;
  return {
    input:
      tokenTable('Tokens at which it fires, most of its firings first (recall):', byCount(input.top), text, share) +
      tokenTable('The same by PMI, in nats:', input.top, text, share),
    output: tokenTable(
      'Tokens that the model predicts next more than usual where it fires, by PMI:',
      output.top,
      text,
      n => `mass ${Number(n.toPrecision(3))}`,
    ),
  };
}
const describeComponent = ({ module, density, meanActivation }: HarvestComponent) =>
  `A component of the matrix ${module}. It fires at ${percent(density)} of all tokens; there its mean activation is ${meanActivation}.`;

const LABEL_WINDOWS = 30;
/**
 * What a label is made from, at most 30 windows, and the harvest's random windows that it is tried on. The label's come
 * from held-out text; where it fires too rarely there, half of the harvest's join them, and the trials have the others.
 */
export function splitExamples({ examples }: HarvestComponent, heldOut: readonly MarkedWindow[]) {
  const { random } = examples;
  const half = heldOut.length < random.length ? Math.ceil(random.length / 2) : 0;
  const forLabel: MarkedWindow[] = [...heldOut, ...random.slice(0, half)].slice(0, LABEL_WINDOWS);
  return { forLabel, forTrials: random.slice(half) };
}
const windowOf = ({ row, start, tokens, ci }: Example, threshold: number): Window => ({
  ...{ row, start, tokens },
  fires: ci.flatMap((g, i) => (g > threshold ? [i] : [])),
});
const LABEL_ANSWER =
  '{"label": "at most 8 words", "confidence": a number from 0 to 1, "reason": "one or two sentences"}';

function labelQuestion(component: HarvestComponent, examples: readonly MarkedWindow[], threshold: number, text: Texts) {
  const { input, output } = statistics(component, text);
  const windows = examples.map(({ tokens, ci }) => {
    const words = tokens.map((token, i) =>
      ci[i]! > threshold ? `<<${shown(text(token))}>>(${Number(ci[i]!.toPrecision(2))})` : shown(text(token)),
    );
    return `- ${words.join('').trim()}`;
  });
  const content = [
    describeComponent(component),
    input + output,
    `Random places where it fires, its causal importance in brackets:\n${windows.join('\n')}`,
    'When does it fire, and what does it do there? Say what is particular, not what any text has in common.',
    LABEL_ANSWER,
  ].join('\n\n');
  return questionOf(component, 'label', 0, content);
}

/** The trial's question; of the intruder without the label. */
export function trialQuestion(subject: Subject, trial: Trial, number: number, label: string, text: Texts): Question {
  const texts = numbered(trial, text);
  const about = `A component was described as: ${JSON.stringify(label)}.`;
  const content = {
    detection: `${about}\nIn which of these texts does it fire at one or more tokens? (None is marked.)\n\n${texts}\n\n{"windows": [numbers]}`,
    fuzzing: `${about}\nIn some of these texts the tokens at which it fires are marked, in others as many tokens at random. In which are the marks right?\n\n${texts}\n\n{"windows": [numbers]}`,
    intruder: `In all of these texts but one the same component fires, at the marked tokens; in one it is another component. Which one?\n\n${texts}\n\n{"window": number}`,
  };
  return questionOf(subject, trial.kind, number, content[trial.kind]);
}

// ---- Answers --------------------------------------------------------------------------------------------------------

/** The last JSON object in a text; undefined where there is none. */
function jsonIn(content: string): Record<string, unknown> | undefined {
  const end = content.lastIndexOf('}');
  for (let start = content.indexOf('{'); start >= 0 && start < end; start = content.indexOf('{', start + 1)) {
    try {
      const value = JSON.parse(content.slice(start, end + 1));
      if (typeof value === 'object' && value !== null) return value;
    } catch {
      // a brace of the text before it
    }
  }
  return undefined;
}
const line = (text: unknown, length: number) =>
  typeof text === 'string'
    ? text
        .replace(/[\p{C}\p{Zl}\p{Zp}\s]+/gu, ' ')
        .trim()
        .slice(0, length)
    : '';

export type Label = { label: string; confidence: number | null; reason: string };
/** At most 8 words; undefined where the answer has no label. */
export function readLabel(content: string): Label | undefined {
  const value = jsonIn(content);
  const label = line(value?.label, 120).split(' ').slice(0, 8).join(' ');
  const confidence = Number(value?.confidence);
  if (!label) return undefined;
  const sure = typeof value?.confidence === 'number' && confidence >= 0 && confidence <= 1;
  return { label, confidence: sure ? confidence : null, reason: line(value?.reason, 500) };
}
/** The windows that an answer names; undefined where it can't be read. */
export function readNumbers(content: string, { kind, windows }: Trial): number[] | undefined {
  const value = jsonIn(content);
  const named = kind === 'intruder' ? [value?.window].flat() : value?.windows;
  if (!Array.isArray(named) || (kind === 'intruder' && named.length !== 1)) return undefined;
  const numbers = [...new Set(named)];
  const valid = numbers.every(n => Number.isInteger(n) && n >= 1 && n <= windows.length);
  return valid ? (numbers as number[]) : undefined;
}

export type StoredAnswer = { content: string; model: string; tokensIn: number; tokensOut: number };
const ANSWERS = 'interpretations.answers.jsonl';
const PROMPTS = 'interpretations.prompts.jsonl';

/** Lines of a JSONL; a last one that was cut off is left out. @throws UsageError naming another line that is no object */
function readLines(file: string): Record<string, unknown>[] {
  const lines = fs.readFileSync(file, 'utf8').split('\n');
  const cutOff = lines.pop(); // empty where the last line is whole
  const parsed = (text: string): unknown => {
    try {
      return JSON.parse(text);
    } catch {
      return undefined;
    }
  };
  const objects = lines.flatMap((text, i) => {
    if (!text.trim()) return [];
    const value = parsed(text);
    if (typeof value !== 'object' || value === null || Array.isArray(value))
      return files.refuse(`${file}: line ${i + 1} is no JSON object`);
    return [value as Record<string, unknown>];
  });
  const last = cutOff?.trim() ? parsed(cutOff) : undefined;
  return typeof last === 'object' && last !== null ? [...objects, last as Record<string, unknown>] : objects;
}

/** What has been answered, by question. Every new answer is on disk before it counts. */
function openStore(dir: string) {
  const file = path.join(dir, ANSWERS);
  const answers = new Map<string, StoredAnswer>();
  const components = new Set<string>(); // of which there is any answer
  const whole: string[] = [];
  const keep = (value: Record<string, unknown>, where: string): string | undefined => {
    const { id, content, model, tokensIn, tokensOut } = value;
    if (typeof id !== 'string' || typeof content !== 'string')
      return files.refuse(`${where}: takes {"id": text, "content": text} a line`);
    const tokens = (n: unknown) => (typeof n === 'number' && n >= 0 ? n : 0);
    const answer = {
      content: content.slice(0, 8192),
      model: line(model, 200) || 'unnamed',
      tokensIn: tokens(tokensIn),
      tokensOut: tokens(tokensOut),
    };
    answers.set(id, answer);
    components.add(id.split('/', 1)[0]!);
    return JSON.stringify({ id, ...answer });
  };
  if (fs.existsSync(file)) {
    const values = readLines(file);
    for (const value of values) whole.push(keep(value, file)!);
    // a start that died in the middle of a line must not spoil the next one
    if (!fs.readFileSync(file).subarray(-1).equals(Buffer.from('\n')))
      files.writeAtomic(file, whole.map(text => `${text}\n`).join(''));
  }
  return {
    answers,
    components,
    add(value: Record<string, unknown>, where: string): void {
      fs.appendFileSync(file, `${keep(value, where)}\n`);
    },
  };
}
type Store = ReturnType<typeof openStore>;

// ---- One component --------------------------------------------------------------------------------------------------

/** A line of interpretations.jsonl. */
export type Interpretation = {
  module: string;
  index: number;
  kind: Kind;
  result: unknown;
  model: string;
  tokens: number;
};
/** What a question was answered, or undefined: not yet. */
export type Asker = (question: Question) => Promise<StoredAnswer | undefined>;
const total = (answers: StoredAnswer[]) => answers.reduce((sum, a) => sum + a.tokensIn + a.tokensOut, 0);

/** Asks all trials of a kind. @returns nothing where not all are answered; a score of null where none can be read */
async function scoreKind(subject: Subject, kind: TrialKind, trials: Trial[], label: string, text: Texts, asked: Asker) {
  const answers: StoredAnswer[] = [];
  const scores: number[] = [];
  for (const [number, trial] of trials.entries()) {
    const answer = await asked(trialQuestion(subject, trial, number, label, text));
    if (!answer) continue;
    answers.push(answer);
    const named = readNumbers(answer.content, trial);
    if (named) scores.push(scoreTrial(trial, named));
  }
  if (trials.length === 0 || answers.length < trials.length) return undefined;
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const result = {
    score: scores.length > 0 ? mean(scores) : null,
    trials: trials.length,
    unreadable: trials.length - scores.length,
    chance: CHANCE[kind],
    ...(kind === 'intruder' && { tokenOverlap: mean(trials.map(overlapBaseline)) }),
  };
  const { module, index } = subject;
  return { module, index, kind, result, model: answers[0]!.model, tokens: total(answers) };
}

/** Label, then the trials. Questions without an answer are left out; those that need a label wait for it. */
async function interpretComponent(
  component: HarvestComponent,
  material: Material,
  asked: Asker,
): Promise<Interpretation[]> {
  const { subjects, pool, text, threshold } = material;
  const { module, index, column } = component;
  const subject = subjects.get(column)!;
  const lines: (Interpretation | undefined)[] = [];
  const answer = await asked(labelQuestion(component, subject.forLabel, threshold, text));
  const label = answer && readLabel(answer.content);
  if (answer) {
    const result = label ?? { label: null, confidence: null, reason: 'the answer has no label' };
    lines.push({ module, index, kind: 'label', result, model: answer.model, tokens: total([answer]) });
  }
  const trials = (kind: TrialKind, list: Trial[]) => scoreKind(subject, kind, list, label?.label ?? '', text, asked);
  if (label) {
    lines.push(await trials('detection', detectionTrials(subject, pool)));
    lines.push(await trials('fuzzing', fuzzingTrials(subject)));
  }
  lines.push(await trials('intruder', intruderTrials(subject, material.others)));
  return lines.filter(one => one !== undefined);
}

/**
 * Labels that know their neighbours: late to early, early to late, then one from both. Module by module, since a
 * question holds the answers of the modules before it; what a component waits for and never gets is left out.
 */
async function interpretGraph(
  material: Material,
  neighbours: Neighbours,
  plain: ReadonlyMap<string, string>,
  width: number,
  asked: Asker,
): Promise<Interpretation[]> {
  const nameOf = ({ module, index }: { module: string; index: number }) => `${module}:${index}`;
  const lines: Interpretation[] = [];
  const own = new Map<string, string>(); // labels of the pass that is under way, of the modules that it has been at
  const pass = async (kind: Kind, modules: string[], contentOf: (c: HarvestComponent) => string | undefined) => {
    own.clear();
    for (const module of modules) {
      const components = material.components.filter(c => c.module === module);
      const found = await inParallel(components, width, async component => {
        const content = contentOf(component);
        const answer = content && (await asked(questionOf(component, kind, 0, `${content}\n\n${LABEL_ANSWER}`)));
        if (!answer) return;
        const label = readLabel(answer.content);
        const result = label ?? { label: null, confidence: null, reason: 'the answer has no label' };
        const { index } = component;
        lines.push({ module, index, kind, result, model: answer.model, tokens: total([answer]) });
        return label && ([nameOf(component), label.label] as const);
      });
      for (const named of found) if (named) own.set(...named);
    }
    return new Map(own);
  };
  const others = [...new Set(material.components.map(c => c.module))].filter(m => !neighbours.order.includes(m)).sort();
  const order = [...neighbours.order, ...others];
  const section = (title: string, list: string[]) => (list.length > 0 ? `${title}\n${list.join('\n')}` : '');
  const known = (name: string) => own.get(name) ?? plain.get(name);
  const does = await pass('graph-output', [...order].reverse(), c =>
    [
      describeComponent(c),
      statistics(c, material.text).output,
      section(
        'What it feeds most, with what these do:',
        neighbourLines(neighbours.downstream(nameOf(c)), known, material.text),
      ),
      'What does it do, where it fires?',
    ].join('\n\n'),
  );
  const fires = await pass('graph-input', order, c =>
    [
      describeComponent(c),
      statistics(c, material.text).input,
      section(
        'What feeds it most, with when these fire:',
        neighbourLines(neighbours.upstream(nameOf(c)), known, material.text),
      ),
      'When does it fire?',
    ].join('\n\n'),
  );
  await pass('graph-label', order, c => {
    const [output, input] = [does.get(nameOf(c)), fires.get(nameOf(c))];
    if (output === undefined || input === undefined) return undefined;
    return [
      describeComponent(c),
      `When it fires: ${JSON.stringify(input)}.\nWhat it does: ${JSON.stringify(output)}.`,
      'One label for both.',
    ].join('\n\n');
  });
  const kinds = ['graph-output', 'graph-input', 'graph-label'];
  const place = ({ module, index, kind }: Interpretation) =>
    [kinds.indexOf(kind), order.indexOf(module), index] as const;
  return lines.sort((a, b) => {
    const [[k, m, i], [l, n, j]] = [place(a), place(b)];
    return k - l || m - n || i - j;
  });
}

/** What all components' questions are made of. */
interface Material {
  components: HarvestComponent[]; // in the order in which they are interpreted
  subjects: ReadonlyMap<number, Subject & { forLabel: MarkedWindow[] }>; // by column
  others: readonly Subject[]; // among which intruders are
  pool: Pool;
  text: Texts;
  threshold: number;
}

/** Where no token begins with a space (a vocabulary of words), a space stands before each. */
function tokenTexts(vocabulary: Readonly<Record<number, string>>): Texts {
  const all = Object.values(vocabulary);
  const words = !all.some(text => /^\s/.test(text)) && all.some(text => text.length > 1);
  return token => (words ? ' ' : '') + (vocabulary[token] ?? `#${token}`);
}

async function gather(job: files.Run, harvest: Harvest, hashes: { components: string; harvest: string }, most: number) {
  const { pool, texts, firings } = await readPool(job, harvest, hashes, LABEL_WINDOWS);
  const { threshold } = harvest.settings;
  const subjects = new Map(
    harvest.components.map(c => {
      const { module, index, density } = c;
      const { forLabel, forTrials } = splitExamples(c, firings(c));
      return [c.column, { module, index, density, forLabel, windows: forTrials.map(e => windowOf(e, threshold)) }];
    }),
  );
  const material: Material = {
    components: [...harvest.components].sort((a, b) => b.firings - a.firings || a.column - b.column).slice(0, most),
    subjects,
    others: [...subjects.values()],
    pool,
    text: tokenTexts({ ...texts, ...harvest.vocabulary }),
    threshold,
  };
  return material;
}

// ---- The command ----------------------------------------------------------------------------------------------------

interface Settings {
  endpoint: Endpoint | undefined;
  budget: Budget;
  concurrency: number;
  promptsOnly: boolean;
  askAgain: boolean;
}

/** Answers from the store, else from the endpoint, else the question is written down. */
function makeAsker(dir: string, store: Store, settings: Settings) {
  const { endpoint, budget, promptsOnly } = settings;
  const state = { asked: 0, open: 0, untouched: 0, tokensIn: 0, tokensOut: 0, stopped: '' };
  const prompts: string[] = [];
  const written = path.join(dir, `${PROMPTS}.${process.pid}.tmp`);
  const flush = () => {
    fs.appendFileSync(written, prompts.join(''));
    prompts.length = 0;
  };
  if (promptsOnly) fs.writeFileSync(written, '');
  const asker: Asker = async question => {
    const known = store.answers.get(question.id);
    if (known && !(settings.askAgain && unreadable(question, known))) return known;
    if (promptsOnly) {
      const { id, module, index, kind, messages } = question;
      prompts.push(`${JSON.stringify({ id, module, index, kind, messages })}\n`);
      if (prompts.length >= 100) flush();
    }
    if (!endpoint || promptsOnly || state.stopped) {
      state.open++;
      return undefined;
    }
    const answer: Answer | { failed: string; stop: boolean } = await ask(endpoint, question.messages, budget);
    if ('failed' in answer) {
      state.stopped ||= answer.failed;
      state.open++;
      return undefined;
    }
    state.asked++;
    state.tokensIn += answer.tokensIn;
    state.tokensOut += answer.tokensOut;
    store.add({ id: question.id, ...answer, model: endpoint.model }, ANSWERS);
    return store.answers.get(question.id);
  };
  const finish = () => {
    if (!promptsOnly) return;
    flush();
    fs.renameSync(written, path.join(dir, PROMPTS));
  };
  return { asker, state, finish };
}
/** Whether an answer has none of what was asked for. */
const unreadable = ({ kind }: Question, { content }: StoredAnswer) => {
  const value = jsonIn(content);
  return (
    value?.[{ detection: 'windows', fuzzing: 'windows', intruder: 'window' }[kind as TrialKind] ?? 'label'] ===
    undefined
  );
};

/** Runs the job for each item, so many at a time; results in the order of the items. */
export async function inParallel<X, Y>(items: readonly X[], width: number, job: (item: X) => Promise<Y>): Promise<Y[]> {
  const results: Y[] = new Array(items.length);
  let next = 0;
  const worker = async () => {
    while (next < items.length) {
      const own = next++;
      results[own] = await job(items[own]!);
    }
  };
  await Promise.all(Array.from({ length: Math.max(1, Math.min(width, items.length)) }, worker));
  return results;
}

const hashFile = (file: string) => crypto.createHash('sha256').update(fs.readFileSync(file)).digest('hex');

/** interpret --run DIR. @returns 1 where an endpoint or the budget ended it early. @throws UsageError */
export async function interpret(job: files.Run, flags: files.Flags): Promise<number> {
  const dir = job.problem.config.out;
  const harvest = files.readHarvest(dir);
  const hashes = { components: files.componentsHash(dir), harvest: hashFile(path.join(dir, 'harvest.json')) };
  const endpoint = endpointFrom(flags);
  const given = files.textFlag(flags, 'answers');
  const promptsOnly = flags['prompts-only'] === true;
  if (!endpoint && !promptsOnly && given === undefined)
    files.refuse(
      'interpret: takes --api-url and --api-model (key: NANO_API_KEY), or --prompts-only, or --answers FILE',
    );
  const whole = (name: string, otherwise: number, max: number) =>
    files.numberFlag(flags, name, otherwise, { min: 1, max, integer: true });
  const limit = whole('max-tokens', 1e12, 1e12);
  const settings: Settings = {
    ...{ endpoint, promptsOnly, budget: makeBudget(limit), concurrency: whole('concurrency', 8, 256) },
    askAgain: flags['ask-again'] === true,
  };
  const most = whole('most', 1e9, 1e9);
  const prices = ['price-in', 'price-out'].map(name => files.numberFlag(flags, name, 0, { min: 0, max: 1e6 }));
  const neighbours = flags.graph === true ? readNeighbours(dir, hashes.components) : undefined;
  const store = openStore(dir);
  if (given !== undefined) {
    if (!fs.existsSync(given)) files.refuse(`--answers: no file ${given}`);
    for (const value of readLines(given)) store.add(value, given);
  }
  const material = await gather(job, harvest, hashes, most);
  const { asker, state, finish } = makeAsker(dir, store, settings);
  const show = files.liveLine();
  let done = 0;
  const onSignal = () => {
    state.stopped ||= 'interrupted';
  };
  process.once('SIGINT', onSignal);
  const perComponent = await inParallel(material.components, settings.concurrency, async component => {
    if (state.stopped && !store.components.has(`${component.module}:${component.index}`)) {
      state.untouched++;
      return [];
    }
    const lines = await interpretComponent(component, material, asker);
    show(() => `interpret ${++done} of ${material.components.length} components, ${state.asked} answers`);
    return lines;
  });
  const lines = perComponent.flat();
  if (neighbours) {
    const plain = new Map(
      lines.flatMap(({ module, index, kind, result }) => {
        const { label } = result as Label;
        return kind === 'label' && label ? [[`${module}:${index}`, label] as const] : [];
      }),
    );
    lines.push(...(await interpretGraph(material, neighbours, plain, settings.concurrency, asker)));
  }
  process.removeListener('SIGINT', onSignal);
  finish();
  const header = {
    ...{ kind: 'settings', formatVersion: 1, ...hashes },
    settings: {
      trials: TRIALS,
      chance: CHANCE,
      poolPositions: POOL_POSITIONS,
      labelWindows: LABEL_WINDOWS,
      neighbours: NEIGHBOURS,
    },
    bounds: {
      components: material.components.length,
      alive: harvest.components.length,
      open: state.open,
      notBegun: state.untouched,
    },
  };
  files.writeAtomic(
    path.join(dir, 'interpretations.jsonl'),
    [header, ...lines].map(value => `${JSON.stringify(value)}\n`).join(''),
  );
  console.log(summarise(lines, material.components.length));
  const cost = (state.tokensIn * prices[0]! + state.tokensOut * prices[1]!) / 1e6;
  const money = prices.some(p => p > 0) ? `, cost ${cost.toFixed(4)}` : '';
  console.log(`${state.asked} answers paid: ${state.tokensIn} tokens in, ${state.tokensOut} out${money}`);
  if (state.open > 0) {
    const where = promptsOnly ? `; they are in ${path.join(dir, PROMPTS)}, then --answers FILE` : '';
    console.log(`${state.open} questions open${where} (what waits for a label is not counted)`);
  }
  if (state.untouched > 0) console.log(`${state.untouched} components not begun`);
  if (!state.stopped) return 0;
  files.talk(`stopped: ${state.stopped}; what is answered is kept, the same command goes on`);
  return state.stopped === 'interrupted' ? 130 : 1;
}

function summarise(lines: Interpretation[], components: number): string {
  const of = (kind: Kind) => lines.filter(one => one.kind === kind).map(one => one.result as Record<string, number>);
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const labels = lines.filter(({ kind, result }) => kind === 'label' && (result as Label).label !== null).length;
  const out = [`${labels} of ${components} components have a label`];
  for (const kind of Object.keys(TRIALS) as TrialKind[]) {
    const results = of(kind).filter(({ score }) => score !== null);
    if (results.length === 0) continue;
    const overlap =
      kind === 'intruder' ? `, token overlap alone ${mean(results.map(r => r.tokenOverlap!)).toFixed(3)}` : '';
    out.push(
      `${kind.padEnd(10)}${mean(results.map(r => r.score!)).toFixed(3)} over ${results.length} components, chance ${CHANCE[kind]}${overlap}`,
    );
  }
  return out.join('\n');
}

/** What the stages share: files in the run folder that know which components they belong to, texts, tokens, flags. */
import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import type { Module } from '../nano-param-decomp.ts';
import { UsageError } from '../nano-param-decomp.ts';
import type { LmRun } from './run.ts';

export type Flags = Record<string, string | boolean | undefined>;

/** Refuses bad input in one line. Parts of it may be a stranger's text: no control or direction marks. */
export function refuse(message: string): never {
  throw new UsageError(message.slice(0, 500).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '?'));
}
export const talk = (line: string): void => void process.stderr.write(`${line}\n`);

/** SHA-256 of the components that a file of results belongs to. */
export const componentsHash = (dir: string): string =>
  crypto
    .createHash('sha256')
    .update(fs.readFileSync(path.join(dir, 'components.safetensors')))
    .digest('hex');

/** Writes beside and renames, so that nobody ever reads half a file. */
export function writeAtomic(file: string, content: string | Uint8Array): void {
  fs.mkdirSync(path.dirname(file), { recursive: true });
  fs.writeFileSync(`${file}.tmp-${process.pid}`, content);
  fs.renameSync(`${file}.tmp-${process.pid}`, file);
}

/** A stage's file, if it is of these components and of formatVersion 1. */
export function readStage<X>(file: string, components: string): X | undefined {
  if (!fs.existsSync(file)) return undefined;
  try {
    const value = JSON.parse(fs.readFileSync(file, 'utf8'));
    return value?.formatVersion === 1 && value.components === components ? value : undefined;
  } catch {
    return undefined;
  }
}

/** A flag's number, within its bounds. @throws UsageError */
export function numberFlag(flags: Flags, name: string, standard: number, min: number, max: number, integer = false) {
  const raw = flags[name];
  if (raw === undefined) return standard;
  const value = typeof raw === 'string' && raw.trim() ? Number(raw) : Number.NaN;
  if (value >= min && value <= max && (!integer || Number.isInteger(value))) return value;
  return refuse(`--${name}: got ${raw}, takes ${integer ? 'an integer' : 'a number'} from ${min} to ${max}`);
}

/** The tokens of a text, as the target's tokenizer gives them. @throws UsageError */
export function encode({ problem, data }: LmRun, text: string): number[] {
  if (!data.tokenizer) return refuse(`${problem.target.dir}: no tokenizer.json, which a text needs`);
  const { ids } = data.tokenizer.encode(text);
  const { context, vocab } = problem.target.arch;
  if (ids.length === 0) return refuse('the text has no tokens');
  if (ids.length > context) return refuse(`the text has ${ids.length} tokens; the target takes ${context}`);
  if (ids.some((id: number) => id >= vocab)) return refuse(`the text has a token outside of the target's ${vocab}`);
  return [...ids];
}

/** A token as text, with its leading space. */
export function tokenText({ data: { tokenizer } }: LmRun, id: number): string {
  const token = tokenizer?.id_to_token(id);
  if (tokenizer === undefined || token === undefined) return `#${id}`;
  if (token.includes('▁')) return token.replaceAll('▁', ' ');
  return tokenizer.decode([id], { skip_special_tokens: false }) || token;
}

/** The id of one token given as text, with or without its leading space, or as #id. @throws UsageError */
export function tokenId(job: LmRun, text: string): number {
  const { vocab } = job.problem.target.arch;
  const digits = /^#(\d+)$/.exec(text)?.[1];
  if (digits !== undefined && Number(digits) < vocab) return Number(digits);
  const { tokenizer } = job.data;
  for (const form of [text, text.replace(/^ /, '▁'), `▁${text}`, text.replace(/^ /, 'Ġ'), `Ġ${text}`]) {
    const id = tokenizer?.token_to_id(form);
    if (id !== undefined && id < vocab) return id;
  }
  return refuse(`${JSON.stringify(text)}: not one token of this model; takes a token's text, or #id`);
}

/** A component named module:index. */
export type ComponentRef = { m: number; index: number; column: number };
export function component(modules: readonly Module[], spec: string): ComponentRef {
  const [, name = '', digits = ''] = /^(.*):(\d+)$/.exec(spec.trim()) ?? [];
  const m = modules.findIndex(({ path }) => path === name);
  if (m < 0) return refuse(`${spec}: takes module:index, a module being one of ${modules.map(x => x.path).join(', ')}`);
  const index = Number(digits);
  if (index >= modules[m]!.C) return refuse(`${spec}: ${name} has ${modules[m]!.C} components, from 0`);
  return { m, index, column: modules[m]!.offset + index };
}

/** What the stages share: files in the run folder that know which components they belong to, texts, tokens, flags. */
import * as fs from 'node:fs';
import type { Module } from '../nano-param-decomp.ts';
import { tokenText as textOf } from './harvest.ts';
import type { LmRun } from './run.ts';
import { refuse } from './run-files.ts';

export { componentsHash, type Flags, numberFlag, refuse, talk, writeAtomic } from './run-files.ts';

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
export const tokenText = ({ data: { tokenizer } }: LmRun, id: number): string => textOf(tokenizer, id);

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

/** What a column of [ΣC] is called. */
export function nameOf(modules: readonly Module[], column: number): { module: string; index: number } {
  const { path, offset } = modules.findLast(m => m.offset <= column)!;
  return { module: path, index: column - offset };
}

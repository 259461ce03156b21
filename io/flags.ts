import * as fs from 'node:fs';
import * as path from 'node:path';
import { parseArgs } from 'node:util';
import { PRESETS, type Preset, type Sized } from './presets.ts';
import { readRecord } from './record.ts';
import { refuse } from './usage-error.ts';

// A record of fields as flags of a command line: parsed, checked, and listed by --help.

type Value = string | number | boolean;
/** `choices`: one of these words; `place`: a file, a folder, or a name on the hub. */
interface Field<V> {
  value: V;
  help: string;
  choices?: string;
  place?: boolean;
  min?: number;
  max?: number;
  integer?: boolean;
}
type Fields = Readonly<Record<string, Field<Value>>>;

/** A field's flag in kebab-case; a boolean one is turned off by no- before it. */
const flagOf = (name: string) => name.replace(/[A-Z]/g, c => `-${c.toLowerCase()}`);

/** A field's value from the text of its flag. @throws UsageError naming the flag, what it got and what it takes */
function fieldValue(name: string, field: Field<Value>, raw: string | boolean): Value {
  const { value: standard, choices, min = 0, max = 0, integer } = field;
  const takes = (what: string) => refuse(`--${flagOf(name)}: got ${JSON.stringify(raw)}, takes ${what}`);
  if (typeof standard === 'boolean') return raw;
  if (field.place) return fs.existsSync(`${raw}`) ? path.resolve(`${raw}`) : raw; // a run may be revisited from elsewhere
  if (typeof standard === 'string')
    return !choices || choices.split(' ').includes(`${raw}`) ? raw : takes(`one of ${choices}`);
  const value = `${raw}`.trim() === '' ? Number.NaN : Number(raw);
  const fits = value >= min && value <= max && (!integer || Number.isInteger(value));
  return fits ? value : takes(`${integer ? 'an integer' : 'a number'} from ${min} to ${max}`);
}

/**
 * The fields that are given, checked, and the other flags as they are.
 * @param others flags that are no fields, with their types
 * @throws UsageError for one that doesn't exist, or a value that its field doesn't take
 */
export function parseFlags(fields: Fields, others: Readonly<Record<string, 'string' | 'boolean'>>, args: string[]) {
  const all = Object.entries(fields).map(([name, field]) => ({ name, field, flag: flagOf(name) }));
  const options: Record<string, { type: 'string' | 'boolean' }> = {};
  for (const [flag, type] of Object.entries(others)) options[flag] = { type };
  for (const { flag, field } of all) options[flag] = { type: typeof field.value === 'boolean' ? 'boolean' : 'string' };
  let flags: Record<string, string | boolean | undefined>;
  try {
    flags = parseArgs({ args, options, strict: true, allowNegative: true }).values as typeof flags;
  } catch (error) {
    return refuse(`${(error as Error).message.split('. To specify')[0]} (--help lists the flags)`);
  }
  const values: Record<string, Value> = {};
  for (const { name, field, flag } of all) {
    const raw = flags[flag];
    if (raw !== undefined) values[name] = fieldValue(name, field, raw);
  }
  return { values, flags };
}

/** Groups of fields as lines of --help: flag, what it does, [default]. */
export function helpLines(groups: Readonly<Record<string, Fields>>): string {
  const lines = Object.entries(groups).flatMap(([group, fields]) => [
    `\n${group}:`,
    ...Object.entries(fields).map(([name, field]) => {
      const isBoolean = typeof field.value === 'boolean';
      const standard = field.value === '' || isBoolean ? '' : ` [${field.value}]`;
      return `  --${`${isBoolean ? '[no-]' : ''}${flagOf(name)}`.padEnd(36)} ${field.help}${standard}`;
    }),
  ]);
  return lines.join('\n');
}

/** Date and time for a folder's name. */
const stamp = () => new Date().toISOString().slice(0, 19).replace(/\D/g, '-');

type FlagTypes = Readonly<Record<string, 'string' | 'boolean'>>;
interface Program {
  version: string;
  groups: Readonly<Record<string, Fields>>;
  /** commands on a finished run, with the flags that they take besides the fields */
  jobs: Readonly<Record<string, { help: string; flags?: FlagTypes }>>;
}

const usage = ({ version, jobs }: Program) => {
  const lines = (entries: [string, string][]) =>
    entries.map(([name, text]) => `  ${name.padEnd(17)} ${text}\n`).join('');
  const ofJobs = Object.entries(jobs).map(([name, { help }]): [string, string] => [name, help]);
  const ofPresets = Object.entries(PRESETS).map(([name, { source }]): [string, string] => [name, source]);
  return `nano-param-decomp ${version}: takes a trained network apart into rank-one subcomponents

  npx tsx nano-param-decomp.ts [decompose] --model M --data D [--preset P] [flags]
  npx tsx nano-param-decomp.ts [decompose] --resume --out DIR   goes on exactly where DIR stopped
  npx tsx nano-param-decomp.ts [decompose] … --dry-run          checks, estimates and times a step, writes nothing
                       … --dry-run --save-graph FILE.onnx       but the step as a graph, for Netron

With a finished run, npx tsx nano-param-decomp.ts JOB --run DIR [flags]:
${lines(ofJobs)}
Presets (--preset):
${lines(ofPresets)}`;
};

/**
 * Reads a command line; --help and --version are answered here.
 * @returns the job's name (decompose if none is named), the fields that were given, its own flags; for decompose what
 * the preset makes of the target's sizes besides, the record of the run that --resume goes on with, whose fields are
 * given, and a folder for a new one
 * @throws UsageError naming the flag that is wrong
 */
export function commandLine(argv: string[], program: Program) {
  const [name = ''] = argv;
  const job = Object.hasOwn(program.jobs, name) ? program.jobs[name] : undefined;
  const ofDecompose = { preset: 'string', resume: 'boolean', 'dry-run': 'boolean', 'save-graph': 'string' } as const;
  const own: FlagTypes = job ? { run: 'string', ...job.flags } : ofDecompose;
  const fields = Object.assign({}, ...Object.values(program.groups)) as Fields;
  const args = job || name === 'decompose' ? argv.slice(1) : argv;
  const { values, flags } = parseFlags(fields, { ...own, help: 'boolean', version: 'boolean' }, args);
  if (flags.help) console.log(`${usage(program)}${helpLines(program.groups)}`);
  else if (flags.version) console.log(program.version);
  if (flags.help || flags.version) return undefined;
  if (job && typeof flags.run !== 'string') refuse(`${name}: takes --run DIR, the folder of a finished run`);
  if (flags['save-graph'] !== undefined && !flags['dry-run']) refuse('--save-graph: goes with --dry-run');
  let preset: Preset | undefined;
  if (flags.preset !== undefined) {
    const names = Object.keys(PRESETS);
    if (!names.includes(`${flags.preset}`)) refuse(`--preset: got ${flags.preset}, takes one of ${names.join(', ')}`);
    preset = PRESETS[`${flags.preset}`];
  }
  const changes: Record<string, Value> = { ...preset?.config, ...values };
  /** Fields that were not given: those of a run that goes on are in its record. */
  const sizes = (target: Sized) => {
    const all = Object.entries(flags.resume ? {} : (preset?.sizes?.(target) ?? {}));
    return Object.fromEntries(all.filter(([field]) => !Object.hasOwn(values, field)));
  };
  if (job) return { job: name, values: changes, flags, meantFor: {}, sizes, old: undefined };
  if (flags.resume && !changes.out) refuse('--resume: takes --out DIR, the folder of the run to go on with');
  const record = flags.resume ? readRecord(`${changes.out}`) : undefined;
  // A field that came after the run was started is as it was without it: its default.
  const defaults = Object.fromEntries(Object.entries(fields).map(([field, { value }]) => [field, value]));
  const old = record && { ...record, config: { ...defaults, ...(record.config as typeof changes) } };
  const given = { ...old?.config, ...changes };
  given.out ||= path.join('runs', `${path.basename(`${given.model ?? ''}`) || 'run'}-${stamp()}`);
  return { job: 'decompose', values: given, flags, meantFor: preset?.target ?? {}, sizes, old };
}

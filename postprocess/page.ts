/**
 * The page of a run: one HTML file that opens from disk, report.html with the run's data inlined. Token texts are data of strangers: they travel as JSON with everything but plain ASCII escaped, and
 * the page only ever sets textContent.
 */
import * as fs from 'node:fs';
import type { PageMeanings } from './formats.ts';
import type { Example, Harvest } from './harvest.ts';
import type { Scoreboard } from './scoreboard.ts';

export interface ReportData extends PageMeanings {
  config: unknown; // of config.json
  metrics: Record<string, number>; // the final evaluation
  history: Record<string, number>[]; // the lines of metrics.jsonl
  scoreboard?: Scoreboard;
  harvest: Harvest;
}

export const TEMPLATE = new URL('page.html', import.meta.url);
export const PLACEHOLDER = '"@@report-data@@"';
const MAX_REPORT_BYTES = 19e6; // a larger page gets shorter lists and fewer examples; harvest.json has them all

/** The page of a run. Throws when the template has not exactly one placeholder. */
export function renderReport(run: ReportData, template = fs.readFileSync(TEMPLATE, 'utf8')): string {
  const [before, after, ...more] = template.split(PLACEHOLDER);
  if (before === undefined || after === undefined || more.length > 0) {
    throw new Error(`the report's template needs ${PLACEHOLDER} exactly once`);
  }
  const { components, vocabulary, ...rest } = run.harvest;
  const ids = Object.keys(vocabulary).map(Number);
  const numberOf = new Map(ids.map((id, k) => [id, k])); // tokens are numbered by their place in `texts`
  const tokenBytes = ids.length > 2 ** 16 ? 3 : 2;
  const inline = (examples: number, perList: number) => {
    const short = <X>(list: X[]) => list.slice(0, perList);
    const packed = components.map(({ module, index, input, output, partners, ...component }) => {
      const { top, random } = component.examples;
      const scale = Math.max(...[...top, ...random].flatMap(e => e.activation.map(Math.abs)), 1e-30);
      const pack = (list: Example[], n: number) =>
        list.slice(0, n).map(e => packExample(e, numberOf, tokenBytes, scale));
      return {
        ...component,
        input: { ...input, top: short(input.top), bottom: short(input.bottom) },
        output: { top: short(output.top), bottom: short(output.bottom) },
        partners: { jaccard: short(partners.jaccard), pmi: short(partners.pmi) },
        examples: { scale, top: pack(top, Math.ceil(examples / 2)), random: pack(random, Math.floor(examples / 2)) },
      };
    });
    const texts = Object.values(vocabulary);
    return asciiJson({ ...run, harvest: { ...rest, ids, texts, tokenBytes, components: packed } });
  };
  const size = (examples: number, perList: number) => template.length + inline(examples, perList).length;
  let perList = run.harvest.settings.listLength;
  while (perList > 1 && size(2, perList) > MAX_REPORT_BYTES) perList = Math.floor(perList / 2);
  const [none, two] = [size(0, perList), size(2, perList)];
  const examples = Math.floor((2 * (MAX_REPORT_BYTES - none)) / Math.max(1, two - none));
  return before + inline(Math.max(1, examples), perList) + after;
}

/** JSON in which nothing can end a script, start a comment or turn the reading direction: plain ASCII without <>&. */
export function asciiJson(value: unknown): string {
  const escaped = (char: string) => `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`;
  return JSON.stringify(value).replace(/[<>&\u007f-\uffff]/g, escaped);
}

/**
 * [row, start, at, base64]: first the tokens (their numbers, little-endian), then a byte of CI each (255 is 1), then a
 * signed byte of activation each (127 is the largest of the component's examples).
 */
function packExample(
  { row, start, at, tokens, ci, activation }: Example,
  numberOf: Map<number, number>,
  tokenBytes: number,
  scale: number,
): [number, number, number, string] {
  const L = tokens.length;
  const bytes = Buffer.alloc((tokenBytes + 2) * L);
  for (let k = 0; k < L; k++) {
    bytes.writeUIntLE(numberOf.get(tokens[k]!)!, tokenBytes * k, tokenBytes);
    bytes.writeUInt8(Math.ceil(ci[k]! * 255), tokenBytes * L + k); // up: what fires must not look like 0
    bytes.writeInt8(Math.round((activation[k]! / scale) * 127), (tokenBytes + 1) * L + k);
  }
  return [row, start, at, bytes.toString('base64')];
}

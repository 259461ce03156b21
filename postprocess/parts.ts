/** What the stages add to the page: graphs, neighbours, circuits and edits, packed small; the page shows what is there. */
import * as fs from 'node:fs';
import * as path from 'node:path';
import type { Module } from '../nano-param-decomp.ts';
import type { Attributions, Circuit, EditFile, GraphsFile, PromptGraph } from './formats.ts';
import { asciiJson, PLACEHOLDER, TEMPLATE } from './page.ts';
import { componentsHash, readStage, writeAtomic } from './stages.ts';

const GRAPH_BYTES = 6e6; // of all graphs in the page: fewer edges a node where they would be more
const NEIGHBOURS = 8; // of each kind, of each component
const LISTED = 20; // circuits, and edits

type Modules = readonly Pick<Module, 'path' | 'offset' | 'C'>[];

/** kind 0: embedding [token]; 1: component [column, ci, activation]; 2: next token [token, probability]; last: share. */
type PackedNode = [kind: 0 | 1 | 2, position: number, a: number, b: number, c: number, share: number];
export interface PackedGraph {
  tokens: number[];
  strings: string[]; // of the tokens
  names: Record<number, string>; // of the next tokens
  nodes: PackedNode[];
  edges: number[]; // from, to, weight, from, to, weight …
}

const short = (x: number) => Number(x.toPrecision(3));
const columnOf = (modules: Modules, { module, index }: { module: string; index: number }) =>
  modules.find(m => m.path === module)!.offset + index;

/** A graph as the page reads it, with at most so many edges into each node. */
export function packGraph(modules: Modules, graph: PromptGraph, incoming = 16): PackedGraph {
  const nodes = graph.nodes.map((n): PackedNode => {
    const share = short(n.share ?? 1);
    if ('embedding' in n) return [0, n.position, n.embedding, 0, 0, share];
    if ('output' in n) return [2, n.position, n.output, short(n.probability), 0, share];
    return [1, n.position, columnOf(modules, n), short(n.ci), short(n.activation), share];
  });
  const count = new Map<number, number>();
  const edges = graph.edges.flatMap(([from, to, weight]) => {
    const n = count.get(to) ?? 0;
    count.set(to, n + 1);
    return n < incoming ? [from, to, short(weight)] : []; // they come by target, the strongest first
  });
  return { tokens: graph.tokens, strings: graph.strings, names: graph.outputStrings, nodes, edges };
}

function packGraphs(modules: Modules, { graphs }: GraphsFile): PackedGraph[] {
  for (let incoming = 16; ; incoming = Math.floor(incoming / 2)) {
    const packed = graphs.map(g => packGraph(modules, g, incoming));
    if (incoming === 1 || JSON.stringify(packed).length <= GRAPH_BYTES) return packed;
  }
}

/** By column: [its strongest sources, its strongest targets], each [column, A, Aabs, PMI]; −1 − token: an embedding. */
function packNeighbours(modules: Modules, { targets, feeds }: Attributions) {
  type Neighbour = [column: number, A: number, Aabs: number, pmi: number | null];
  const all: Record<number, [from: Neighbour[], to: Neighbour[]]> = {};
  const of = (column: number) => {
    all[column] ??= [[], []];
    return all[column];
  };
  for (const t of targets)
    of(columnOf(modules, t))[0] = t.sources.slice(0, NEIGHBOURS).map((s): Neighbour => {
      const column = 'token' in s ? -1 - s.token : columnOf(modules, s);
      return [column, short(s.A), short(s.Aabs), s.pmi === null ? null : short(s.pmi)];
    });
  for (const f of feeds)
    of(columnOf(modules, f))[1] = f.targets
      .slice(0, NEIGHBOURS)
      .map((t): Neighbour => [columnOf(modules, t), short(t.A), short(t.Aabs), t.pmi === null ? null : short(t.pmi)]);
  return all;
}

/** Everything of this run that its stages have made, for the page's data. */
export function pageParts(dir: string, modules: Modules): Record<string, unknown> {
  const components = componentsHash(dir);
  const graphs = readStage<GraphsFile>(path.join(dir, 'graphs.json'), components);
  const attributions = readStage<Attributions>(path.join(dir, 'attributions.json'), components);
  const all = <X>(name: string) => {
    const folder = path.join(dir, name);
    const files = fs.existsSync(folder) ? fs.readdirSync(folder).filter(f => f.endsWith('.json')) : [];
    return files.flatMap(f => readStage<X>(path.join(folder, f), components) ?? []).slice(0, LISTED);
  };
  const [circuits, edits] = [all<Circuit>('circuits'), all<EditFile>('edits')];
  return {
    ...(graphs && { graphs: packGraphs(modules, graphs) }),
    ...(attributions && { neighbours: packNeighbours(modules, attributions) }),
    ...(circuits.length > 0 && { circuits }),
    ...(edits.length > 0 && { edits }),
  };
}

/** The data of a page that renderReport or this wrote. */
export function pageData(html: string): Record<string, unknown> | undefined {
  const json = /<script id="data" type="application\/json">([^<]*)<\/script>/.exec(html)?.[1];
  return json === undefined ? undefined : JSON.parse(json);
}

/** The page's template with data. */
export function renderPage(data: Record<string, unknown>, template = fs.readFileSync(TEMPLATE, 'utf8')): string {
  return template.split(PLACEHOLDER).join(asciiJson(data));
}

/** Adds what the stages have made to report.html, where the run has one. @returns whether it has */
export function refreshPage(dir: string, modules: Modules): boolean {
  const file = path.join(dir, 'report.html');
  const data = fs.existsSync(file) ? pageData(fs.readFileSync(file, 'utf8')) : undefined;
  if (!data) return false;
  const { graphs: _, neighbours: __, circuits: ___, edits: ____, ...rest } = data;
  writeAtomic(file, renderPage({ ...rest, ...pageParts(dir, modules) }));
  return true;
}

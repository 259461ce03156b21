/**
 * A prompt graph as the JSON that attribution-graph viewers read (circuit-tracer's local page, Neuronpedia): the next
 * tokens of the text's last position and everything that reaches them. Modules are the layers, in the network's order.
 */
import type { LanguageModel, Problem } from '../nano-param-decomp.ts';
import type { GraphNode, PromptGraph } from './formats.ts';
import { networkOrder } from './forward.ts';

/** As circuit-tracer 0.5 declares it (frontend/graph_models.py). */
export interface ViewerGraph {
  metadata: {
    slug: string;
    scan: string;
    transcoder_list: string[];
    prompt_tokens: string[];
    prompt: string;
    node_threshold: number;
    schema_version: 1;
  };
  qParams: { pinnedIds: string[]; supernodes: string[][]; linkType: string; clickedId: string; sg_pos: string };
  nodes: ViewerNode[];
  links: { source: string; target: string; weight: number }[];
}
interface ViewerNode {
  node_id: string; // layer_feature_position
  feature: number;
  layer: string; // 'E': embeddings; one more than the last module: next tokens
  ctx_idx: number;
  feature_type: 'cross layer transcoder' | 'embedding' | 'logit';
  token_prob: number;
  is_target_logit: boolean;
  run_idx: number;
  reverse_ctx_idx: number;
  jsNodeId: string;
  clerp: string; // the label
  influence: number | null; // the share of all influence that this node and the more influential ones have
  activation: number | null;
}

/** The viewer shows nodes whose `influence` is at most this until its reader moves the slider. */
const NODE_THRESHOLD = 0.8;

/** @param slug the graph's name, by which the viewer asks for SLUG.json */
export function viewerGraph(problem: Problem<LanguageModel>, graph: PromptGraph, slug: string): ViewerGraph {
  const { modules } = problem;
  const layerOf = new Map(networkOrder(problem).map((i, layer) => [modules[i]!.path, layer]));
  const last = graph.tokens.length - 1;
  const influence = influences(graph, nextTokens(graph, last));
  const inOrder = [...graph.nodes.keys()].filter(id => influence[id]! > 0 && !('output' in graph.nodes[id]!));
  inOrder.sort((a, b) => influence[b]! - influence[a]!);
  const total = inOrder.reduce((sum, id) => sum + influence[id]!, 0);
  const cumulative = new Map<number, number>();
  let sum = 0;
  for (const id of inOrder) {
    sum += influence[id]!;
    cumulative.set(id, sum / total);
  }
  const always = (n: GraphNode) => 'embedding' in n || ('output' in n && n.position === last);
  const shown = graph.nodes.filter(n => always(n) || cumulative.has(n.id));
  const likeliest = shown.find(n => 'output' in n)?.id; // the first, since they are sorted
  const nodes = shown.map((n): ViewerNode => {
    const t = n.position;
    const score = cumulative.get(n.id) ?? 1;
    const common = { ctx_idx: t, token_prob: 0, is_target_logit: false, run_idx: 0, reverse_ctx_idx: 0 };
    if ('embedding' in n) {
      const [node_id, jsNodeId] = [`E_${n.embedding}_${t}`, `E_${n.embedding}-${t}`];
      const clerp = `Emb: "${graph.strings[t]}"`;
      const own = { node_id, jsNodeId, feature: t, layer: 'E', feature_type: 'embedding' as const, clerp };
      return { ...common, ...own, influence: score, activation: null };
    }
    if ('output' in n) {
      const layer = `${modules.length}`;
      const [node_id, jsNodeId] = [`${layer}_${n.output}_${t}`, `L_${n.output}-${t}`];
      const clerp = `Output "${graph.outputStrings[n.output]}" (p=${n.probability.toFixed(3)})`;
      const own = { node_id, jsNodeId, feature: n.output, layer, feature_type: 'logit' as const, clerp };
      const target = { token_prob: n.probability, is_target_logit: n.id === likeliest };
      return { ...common, ...own, ...target, influence: null, activation: null };
    }
    const layer = `${layerOf.get(n.module)}`;
    const [node_id, jsNodeId] = [`${layer}_${n.index}_${t}`, `${layer}_${n.index}-0`];
    const [feature_type, clerp] = ['cross layer transcoder' as const, `${n.module}:${n.index}`];
    const own = { node_id, jsNodeId, feature: n.index, layer, feature_type, clerp };
    return { ...common, ...own, influence: score, activation: n.activation };
  });
  const idOf = new Map(shown.map((n, i) => [n.id, nodes[i]!.node_id]));
  const links = graph.edges.flatMap(([from, to, weight]) => {
    const [source, target] = [idOf.get(from), idOf.get(to)];
    return source !== undefined && target !== undefined ? [{ source, target, weight }] : [];
  });
  return {
    metadata: {
      ...{ slug, scan: problem.target.arch.type, transcoder_list: [], prompt_tokens: graph.strings },
      ...{ prompt: graph.text, node_threshold: NODE_THRESHOLD, schema_version: 1 },
    },
    qParams: { pinnedIds: [], supernodes: [], linkType: 'both', clickedId: '', sg_pos: '' },
    nodes,
    links,
  };
}

/** The next tokens at a position, each with its probability. */
export const nextTokens = (graph: PromptGraph, position: number): [id: number, weight: number][] =>
  graph.nodes.flatMap(n => ('output' in n && n.position === position ? [[n.id, n.probability]] : []));

/**
 * Of each node on some, which have their weights: a source gets from each of its targets the target's influence times
 * the edge's share of the absolute weights that come in there.
 */
export function influences(graph: PromptGraph, on: readonly [id: number, weight: number][]): Float64Array {
  const influence = new Float64Array(graph.nodes.length);
  for (const [id, weight] of on) influence[id] = weight;
  const incoming = new Map<number, [from: number, weight: number][]>();
  for (const [from, to, weight] of graph.edges) {
    const list = incoming.get(to) ?? [];
    list.push([from, Math.abs(weight)]);
    incoming.set(to, list);
  }
  // an edge's source always has the smaller id: nodes are in the order of positions, then of the network
  for (let id = graph.nodes.length - 1; id >= 0; id--) {
    const list = incoming.get(id) ?? [];
    const total = list.reduce((sum, [, weight]) => sum + weight, 0);
    if (total > 0) for (const [from, weight] of list) influence[from]! += (influence[id]! * weight) / total;
  }
  return influence;
}

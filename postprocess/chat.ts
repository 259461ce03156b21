/**
 * One question to a chat-completions endpoint, as every provider and local server speaks it: retries with back-off, a
 * budget in tokens, bounded sizes. The key comes from the environment and goes into one header, and nowhere else.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { type Flags, numberFlag, refuse, textFlag } from './run-files.ts';

export type Message = { role: 'system' | 'user'; content: string };
export interface Endpoint {
  url: URL; // ends in /chat/completions
  model: string;
  key: string | undefined;
  answerTokens: number; // longest answer
  tries: number;
  firstWait: number; // ms before the second try; doubles, at most two minutes
  timeout: number; // ms for one try
}
export type Answer = { content: string; tokensIn: number; tokensOut: number };
/** Why there is no answer. `stop`: the next question would fare no better. */
export type Failure = { failed: string; stop: boolean };

const MAX_WAIT = 120_000; // ms
const MAX_BODY = 1 << 20; // bytes of a response that are read
const MAX_ANSWER = 8192; // characters of an answer that are kept

export const ENDPOINT_FLAGS = {
  'api-url': 'string', // https://host/v1
  'api-model': 'string',
  'answer-tokens': 'string', // longest answer, default 600
  tries: 'string', // of one question, default 6
  timeout: 'string', // seconds for one try, default 120
  'retry-wait': 'string', // seconds before the second try, default 1; doubles each time
} as const;

/** The endpoint that the flags name; undefined without --api-url. @throws UsageError */
export function endpointFrom(flags: Flags, key = process.env.NANO_API_KEY || undefined): Endpoint | undefined {
  const [given, model] = [textFlag(flags, 'api-url'), textFlag(flags, 'api-model')];
  if (given === undefined) return model === undefined ? undefined : refuse('--api-model: takes an --api-url as well');
  if (model === undefined) return refuse('--api-url: takes an --api-model as well');
  if (!URL.canParse(given)) return refuse('--api-url: takes an address as in https://host/v1');
  const url = new URL(given);
  if (!/^https?:$/.test(url.protocol)) return refuse('--api-url: takes http or https');
  if (url.username || url.password) return refuse('--api-url: no names and passwords; the key comes from NANO_API_KEY');
  const local = /^(localhost|127\.[\d.]+|\[::1\])$/.test(url.hostname);
  if (key && url.protocol === 'http:' && !local)
    return refuse('--api-url: http would send the key readable; takes https, or http on this machine');
  if (key && !/^[\x21-\x7e]+$/.test(key)) return refuse('NANO_API_KEY: takes visible ASCII characters only');
  if (!url.pathname.endsWith('/chat/completions')) url.pathname = `${url.pathname.replace(/\/$/, '')}/chat/completions`;
  const whole = (name: string, otherwise: number, max: number) =>
    numberFlag(flags, name, otherwise, { min: 1, max, integer: true });
  return {
    ...{ url, model, key },
    answerTokens: whole('answer-tokens', 600, 100_000),
    tries: whole('tries', 6, 100),
    firstWait: 1000 * numberFlag(flags, 'retry-wait', 1, { min: 0, max: 120 }),
    timeout: 1000 * numberFlag(flags, 'timeout', 120, { min: 0.01, max: 3600 }),
  };
}

const SHORTEST_PART = 8;
/** The text, or nothing of it where it repeats a part of the key. A shorter key is no secret: local servers take any. */
export function withoutKey(text: string, key: string | undefined): string {
  for (let i = 0; key && i + SHORTEST_PART <= key.length; i++)
    if (text.includes(key.slice(i, i + SHORTEST_PART))) return '(left out: repeats a part of the key)';
  return text;
}

/** At most so many tokens: no tokeniser makes more of a text than it has bytes, and an answer is bounded. */
export const mostTokens = ({ answerTokens }: Endpoint, messages: readonly Message[]): number =>
  answerTokens + messages.reduce((sum, { content }) => sum + Buffer.byteLength(content) + 16, 16);

/** Tokens that may be spent. What is under way counts with the most that it can cost. */
export function makeBudget(limit: number) {
  let [spent, reserved] = [0, 0];
  let waiting: (() => void)[] = [];
  return {
    spent: () => spent,
    /** Waits for room. @returns false where there is none even when everything under way is settled */
    async reserve(tokens: number): Promise<boolean> {
      while (spent + reserved + tokens > limit) {
        if (reserved === 0) return false;
        await new Promise<void>(resolve => waiting.push(resolve));
      }
      reserved += tokens;
      return true;
    },
    settle(tokens: number, actual: number): void {
      reserved -= tokens;
      spent += actual;
      const all = waiting;
      waiting = [];
      for (const wake of all) wake();
    },
  };
}
export type Budget = ReturnType<typeof makeBudget>;

/** A body of at most MAX_BODY bytes as text. @throws where it is cut off, or longer */
async function readBody(response: Response): Promise<string> {
  const chunks: Uint8Array[] = [];
  let length = 0;
  const reader = response.body?.getReader();
  while (reader) {
    const { done, value } = await reader.read();
    if (done) break;
    length += value.length;
    if (length > MAX_BODY) {
      await reader.cancel();
      throw new Error(`more than ${MAX_BODY} bytes`);
    }
    chunks.push(value);
  }
  return Buffer.concat(chunks).toString('utf8');
}

type Attempt = { answer: Answer } | { failed: string; again: boolean; wait?: number; paid: boolean };
/** One try. `paid`: the provider may have charged for it all the same. */
async function attempt(endpoint: Endpoint, messages: readonly Message[]): Promise<Attempt> {
  const { url, model, key, answerTokens, timeout } = endpoint;
  const headers = { 'content-type': 'application/json', ...(key && { authorization: `Bearer ${key}` }) };
  const body = JSON.stringify({ model, messages, max_tokens: answerTokens });
  let sent = false;
  try {
    const signal = AbortSignal.timeout(timeout);
    const response = await fetch(url, { method: 'POST', headers, body, signal, redirect: 'error' });
    sent = response.ok;
    const { status } = response;
    const text = await readBody(response);
    if (!response.ok) {
      const again = status === 408 || status === 409 || status === 429 || status >= 500;
      const after = Number(response.headers.get('retry-after'));
      // of a refused key the endpoint's own words are not repeated: some quote it
      const words = status === 401 || status === 403 ? '' : `: ${withoutKey(text.slice(0, 200), key)}`;
      const wait = after > 0 ? { wait: 1000 * after } : {};
      return { failed: `status ${status}${words}`, again, paid: false, ...wait };
    }
    return { answer: readAnswer(text, endpoint, messages) };
  } catch (error) {
    const { name, message, cause } = error as Error & { cause?: { code?: string } };
    const what = name === 'TimeoutError' ? `no answer in ${timeout / 1000} s` : (cause?.code ?? message);
    return { failed: withoutKey(what, key), again: true, paid: sent || name === 'TimeoutError' };
  }
}

/** @throws where it is no chat completion */
function readAnswer(text: string, endpoint: Endpoint, messages: readonly Message[]): Answer {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error('a response that is not JSON');
  }
  const { choices, usage } = (value ?? {}) as Record<string, unknown>;
  const first = Array.isArray(choices) ? choices[0] : undefined;
  const content = first?.message?.content ?? '';
  if (typeof content !== 'string' || first === undefined) throw new Error('a response without choices');
  const count = (name: string, otherwise: number) => {
    const n = Number((usage as Record<string, unknown> | undefined)?.[name]);
    return Number.isFinite(n) && n >= 0 ? n : otherwise; // not told: the most that it can be
  };
  const { answerTokens } = endpoint;
  return {
    content: withoutKey(content.slice(0, MAX_ANSWER), endpoint.key),
    tokensIn: count('prompt_tokens', mostTokens(endpoint, messages) - answerTokens),
    tokensOut: count('completion_tokens', answerTokens),
  };
}

/**
 * Asks until there is an answer: 429, 5xx, broken connections and cut responses are tried again, after 1, 2, 4 … s or
 * what the endpoint asks for. Never throws for what an endpoint does.
 */
export async function ask(endpoint: Endpoint, messages: readonly Message[], budget: Budget): Promise<Answer | Failure> {
  const most = mostTokens(endpoint, messages);
  let last = '';
  for (let n = 0; n < endpoint.tries; n++) {
    if (!(await budget.reserve(most))) return { failed: 'the budget of --max-tokens is used up', stop: true };
    const result = await attempt(endpoint, messages);
    if ('answer' in result) {
      const { answer } = result;
      budget.settle(most, answer.tokensIn + answer.tokensOut);
      return answer;
    }
    budget.settle(most, result.paid ? most : 0); // may have been charged: counts as if it was
    last = result.failed;
    if (!result.again) break;
    const wait = result.wait ?? endpoint.firstWait * 2 ** n * (1 + 0.25 * Math.random());
    if (n + 1 < endpoint.tries) await sleep(Math.min(MAX_WAIT, wait));
  }
  return { failed: `${endpoint.url.origin}${endpoint.url.pathname}: ${last}`, stop: true };
}

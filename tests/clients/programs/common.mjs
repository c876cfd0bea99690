// What the Node programs share; see common.py.
import { readFileSync } from 'node:fs'

export const { BASE, CHAT_MODEL: CHAT, EMBED_MODEL: EMBED, TOOLS_MODEL: TOOLS, IMAGES_MODEL: IMAGES } = process.env
export const QUESTION = 'What is the capital of France? Answer in one sentence.'
export const PIXEL =
  'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
export const PLACE = { type: 'object', properties: { place: { enum: ['Paris'] } }, required: ['place'] }
export const TEXTS = ['a cat', 'a kitten', 'the annual report of a bank']
const ENDED = 30_000

export function yes(condition, what) {
  if (!condition) throw new Error(what)
}

export function aboutParis(text) {
  yes(text?.includes('Paris'), `no true answer: ${text}`)
}

export function sees(text) {
  yes(text?.includes('[image]'), `the engine has not seen it: ${text}`)
}

export function alike([cat, kitten, report]) {
  const far = (a, b) => Math.hypot(...a.map((value, at) => value - b[at]))
  yes(far(cat, kitten) < 0.8 * far(cat, report), 'a cat is no more like a kitten than like a report')
}

export async function ended() {
  const line = `vllmd_model_running_requests{model="${CHAT}"} 0`
  for (const deadline = Date.now() + ENDED; ; ) {
    if ((await (await fetch(`${BASE}/metrics`)).text()).includes(line)) return
    yes(Date.now() < deadline, 'the engine still works on it')
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
}

export async function refused(ask, status, words) {
  try {
    await ask()
  } catch (error) {
    yes(error.status >= 400 && (!status || error.status === status), `another error: ${error}`)
    yes(String(error.message).includes(words), `the error does not say ${words}: ${error.message}`)
    return error.constructor.name
  }
  throw new Error('nothing was raised')
}

export async function run(name, functions) {
  const file = `${process.env.NODE_MODULES}/${name}/package.json`
  console.log(JSON.stringify({ version: JSON.parse(readFileSync(file)).version }))
  for (const [called, work] of Object.entries(functions)) {
    let told = ''
    let ok = true
    try {
      told = (await work()) ?? ''
    } catch (error) {
      console.error(error)
      ok = false
      told = `${error.constructor.name}: ${error.message}`.split('\n')[0].slice(0, 300)
    }
    console.log(JSON.stringify({ function: called, ok, told }))
  }
}

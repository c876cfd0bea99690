// Vercel's AI SDK with its provider for servers of OpenAI's API.
import { BASE, CHAT, EMBED, PLACE, QUESTION, TEXTS, TOOLS, aboutParis, alike, ended, run, yes } from './common.mjs'

const at = (name) => import(`${process.env.NODE_MODULES}/${name}/dist/index.js`).catch(() => import(`${process.env.NODE_MODULES}/${name}/dist/index.mjs`))
const { embedMany, generateText, jsonSchema, streamText, tool } = await at('ai')
const { createOpenAICompatible } = await at('@ai-sdk/openai-compatible')
const provider = createOpenAICompatible({ name: 'vllmd', baseURL: `${BASE}/v1`, includeUsage: true })
const few = { maxOutputTokens: 24, temperature: 0, maxRetries: 0 }

await run('ai', {
  async chat() {
    aboutParis((await generateText({ model: provider(CHAT), prompt: QUESTION, ...few })).text)
  },
  async stream() {
    aboutParis(await streamText({ model: provider(CHAT), prompt: QUESTION, ...few }).text)
  },
  async tools() {
    const tools = { weather: tool({ description: 'The weather', inputSchema: jsonSchema(PLACE), strict: true }) }
    const answer = await generateText({
      model: provider(TOOLS), prompt: 'Weather in Paris?', tools, toolChoice: { type: 'tool', toolName: 'weather' },
      ...few, maxOutputTokens: 1500, temperature: 1,
    })
    yes(answer.toolCalls[0].input.place === 'Paris', 'no call of the tool')
  },
  async embeddings() {
    const model = (provider.embeddingModel ?? provider.textEmbeddingModel).call(provider, EMBED)
    alike((await embedMany({ model, values: TEXTS })).embeddings)
  },
  async cancel() {
    const leaving = new AbortController()
    const { textStream } = streamText({
      model: provider(CHAT), prompt: QUESTION, ...few, maxOutputTokens: 4000, abortSignal: leaving.signal, onError() {},
    })
    for await (const _ of textStream) leaving.abort()
    await ended()
  },
  async errors() {
    try {
      await generateText({ model: provider('nobody'), prompt: QUESTION, ...few })
    } catch (error) {
      yes(error.statusCode === 404 && error.message.includes('nobody'), `another error: ${error}`)
      return error.name
    }
    throw new Error('nothing was raised')
  },
})

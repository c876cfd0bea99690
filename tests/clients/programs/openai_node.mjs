// openai, OpenAI's JavaScript library.
import { BASE, CHAT, EMBED, PIXEL, PLACE, QUESTION, TOOLS, aboutParis, ended, refused, run, yes } from './common.mjs'

const { default: OpenAI } = await import(`${process.env.NODE_MODULES}/openai/index.mjs`)
const client = new OpenAI({ baseURL: `${BASE}/v1`, apiKey: 'none', maxRetries: 0 })
const messages = [{ role: 'user', content: QUESTION }]
const few = { max_tokens: 24, temperature: 0 }

await run('openai', {
  async list() {
    const found = []
    for await (const model of client.models.list()) found.push(model.id)
    yes(found.includes(CHAT), 'the model is not in the list')
  },
  async chat() {
    aboutParis((await client.chat.completions.create({ model: CHAT, messages, ...few })).choices[0].message.content)
  },
  async responses() {
    aboutParis((await client.responses.create({ model: CHAT, input: QUESTION, max_output_tokens: 24, temperature: 0 })).output_text)
  },
  async stream() {
    let text = ''
    const events = await client.chat.completions.create({ model: CHAT, messages, ...few, stream: true })
    for await (const chunk of events) text += chunk.choices[0]?.delta.content ?? ''
    aboutParis(text)
  },
  async tools() {
    const answer = await client.chat.completions.create({
      model: TOOLS, messages: [{ role: 'user', content: 'Weather in Paris?' }], max_tokens: 200, temperature: 0,
      tools: [{ type: 'function', function: { name: 'weather', parameters: PLACE } }], tool_choice: { type: 'function', function: { name: 'weather' } },
    })
    yes(answer.choices[0].message.tool_calls[0].function.name === 'weather', 'no call of the tool')
  },
  async images() {
    const url = `data:image/png;base64,${PIXEL}`
    const content = [{ type: 'text', text: 'What is it?' }, { type: 'image_url', image_url: { url } }]
    const ask = () => client.chat.completions.create({ model: CHAT, messages: [{ role: 'user', content }] })
    return `refused by the engine, which sees none: ${await refused(ask, 0, 'image')}`
  },
  async embeddings() {
    const answer = await client.embeddings.create({ model: EMBED, input: ['a cat', 'a couch'] })
    yes(answer.data.length === 2 && answer.data[0].embedding.length > 100, 'no embeddings')
  },
  async cancel() {
    const events = await client.chat.completions.create({ model: CHAT, messages, max_tokens: 4000, stream: true })
    for await (const _ of events) break
    await ended()
  },
  errors: () => refused(() => client.chat.completions.create({ model: 'nobody', messages }), 404, 'nobody'),
})

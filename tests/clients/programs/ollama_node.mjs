// ollama, Ollama's JavaScript library.
import { BASE, CHAT, EMBED, IMAGES, PIXEL, PLACE, QUESTION, TEXTS, aboutParis, alike, ended, run, sees, yes } from './common.mjs'

const { Ollama } = await import(`${process.env.NODE_MODULES}/ollama/dist/index.mjs`)
const client = new Ollama({ host: BASE })
const messages = [{ role: 'user', content: QUESTION }]
const options = { num_predict: 24, temperature: 0 }

await run('ollama', {
  async list() {
    yes((await client.list()).models.some((model) => model.model === `${CHAT}:latest`), 'the model is not in the list')
  },
  async chat() {
    aboutParis((await client.chat({ model: CHAT, messages, options })).message.content)
  },
  async stream() {
    let text = ''
    for await (const part of await client.chat({ model: CHAT, messages, options, stream: true })) text += part.message.content
    aboutParis(text)
  },
  async tools() {
    const tools = [{ type: 'function', function: { name: 'weather', description: 'The weather', parameters: PLACE } }]
    const answer = await client.chat({ model: IMAGES, messages, tools })
    yes(answer.message.tool_calls[0].function.name === 'weather', 'no call of the tool')
  },
  async images() {
    const answer = await client.chat({ model: IMAGES, messages: [{ role: 'user', content: 'What?', images: [PIXEL] }] })
    sees(answer.message.content)
  },
  async embeddings() {
    alike((await client.embed({ model: EMBED, input: TEXTS })).embeddings)
  },
  async cancel() {
    const parts = await client.chat({ model: CHAT, messages, options: { num_predict: 4000 }, stream: true })
    await parts[Symbol.asyncIterator]().next()
    parts.abort()
    await ended()
  },
  async errors() {
    try {
      await client.chat({ model: 'nobody', messages })
    } catch (error) {
      yes(error.status_code === 404 && error.message.includes('nobody'), `another error: ${error}`)
      return error.name
    }
    throw new Error('nothing was raised')
  },
})

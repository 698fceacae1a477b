/** What a promise was rejected with, in JSON; `field` is one to ask the error for. */
export async function failure(promise, field = "num_inference_steps") {
  try {
    return { resolved: await promise };
  } catch (error) {
    return {
      name: error.name,
      message: error.message,
      status: error.status,
      body: error.body,
      requestId: error.requestId,
      timeoutType: error.timeoutType,
      fieldErrors: error.getFieldErrors?.(field),
    };
  }
}

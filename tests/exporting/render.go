// Renders templates as Ollama does: {"template": …, "messages": [{"role": …, "content": …}, …]} on
// each line of standard input becomes a JSON string on a line of standard output.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var asked struct {
			Template string
			Messages []message
		}
		if err := json.Unmarshal(lines.Bytes(), &asked); err != nil {
			panic(err)
		}
		var system []string
		for _, m := range asked.Messages {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
		}
		var out strings.Builder
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
		err := parsed.Execute(&out, map[string]any{
			"System": strings.Join(system, "\n\n"), "Messages": asked.Messages, "Response": "",
		})
		if err != nil {
			panic(err)
		}
		answer, _ := json.Marshal(out.String())
		os.Stdout.Write(append(answer, '\n'))
	}
}
